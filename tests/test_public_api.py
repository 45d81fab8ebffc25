"""The public functions: the signatures that users were promised, and documentation that runs."""

from __future__ import annotations

import inspect
import re

import pytest

import npmamba

# Positional arguments as in the field's own `selective_scan_fn`; what is new here is keyword-only.
SIGNATURES = {
    "selective_scan": """u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *,
        initial_state=None, return_last_state=False, discretization='euler', seq_idx=None, reverse=False,
        precise=False""",
    "selective_scan_backward": """dout, u, delta, A, B, C, D=None, z=None, delta_bias=None,
        delta_softplus=False, *, initial_state=None, dlast_state=None, discretization='euler', seq_idx=None,
        reverse=False""",
    "selective_state_update": """state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *,
        discretization='euler'""",
    "causal_conv1d": """x, weight, bias=None, *, activation=None, initial_state=None,
        return_last_state=False, seq_idx=None, reverse=False""",
    "causal_conv1d_backward": """dout, x, weight, bias=None, *, activation=None, initial_state=None,
        dlast_state=None, seq_idx=None, reverse=False""",
    "causal_conv1d_update": "state, x, weight, bias=None, *, activation=None",
    "rms_norm": "x, weight, *, eps=1e-05, residual=None",
    "rms_norm_backward": "dout, x, weight, *, eps=1e-05, residual=None, dresidual=None",
    "cross_entropy": "logits, labels, *, ignore_index=-100",
    "cross_entropy_backward": "dout, logits, labels, *, ignore_index=-100",
    "embedding": "weight, input_ids",
    "embedding_backward": "dout, input_ids, vocab_size",
}
FIELDS = {
    "selective_scan_backward": "u delta A B C D z delta_bias initial_state",
    "causal_conv1d_backward": "x weight bias initial_state",
    "rms_norm_backward": "x weight residual",
}


def public(kind):
    return [name for name in npmamba.__all__ if name != "__version__" and kind(getattr(npmamba, name))]


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_a_signature_is_the_one_promised(name):
    signature = inspect.signature(getattr(npmamba, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert shown == f"({' '.join(SIGNATURES[name].split())})"


def test_every_public_function_has_a_promised_signature():
    assert sorted(public(inspect.isfunction)) == sorted(SIGNATURES)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_a_public_function_is_documented_with_an_example(name):
    function = getattr(npmamba, name)
    text = inspect.getdoc(function) or ""
    parameters, returns = text.find("Parameters\n---"), text.find("Returns\n---")
    assert 0 < parameters < returns, "numpydoc sections Parameters and Returns, in this order"
    assert ">>> " in text, "an example that doctest runs"
    section = text[parameters:returns]
    arguments = inspect.signature(function).parameters
    assert [name for name in arguments if not re.search(rf"^[\w, ]*\b{name}\b", section, re.M)] == []


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_gradients_come_by_the_names_of_their_arguments(name):
    """The return annotation of a backward function is the named tuple it returns."""
    function = getattr(npmamba, name)
    returned = getattr(inspect.getmodule(function), function.__annotations__["return"])
    assert returned._fields == tuple(FIELDS[name].split())


def test_the_public_classes_are_documented():
    classes = public(inspect.isclass)
    assert sorted(classes) == ["MambaConfig", "MambaLM"]
    for name in classes:
        assert len(inspect.getdoc(getattr(npmamba, name)) or "") > 100
