"""The operations users call: equations, shapes, checks; forward and vjp side by side."""
