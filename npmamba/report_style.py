"""Style and script of the report page: one accent colour, light and dark, wide and narrow screens."""

STYLE = """
:root {
  --paper:#fcfbf9; --card:#fff; --ink:#1c1b22; --soft:#6c6a75; --rule:#e6e3dd; --grid:#efece6;
  --accent:#0d7a6f; --second:#c2571a; --mark:#0d7a6f1c;
}
@media(prefers-color-scheme:dark) {
  :root {
    --paper:#131417; --card:#1b1c21; --ink:#ecebf0; --soft:#9b99a6; --rule:#2d2e36; --grid:#26272e;
    --accent:#3fc8b6; --second:#f0925a; --mark:#3fc8b62b;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
}
main { max-width: 920px; margin: 0 auto; padding: 48px 20px 72px }
h1 {
  font-size: clamp(1.9rem,5vw,2.7rem); line-height: 1.1; letter-spacing: -.025em; margin: .1em 0 .7em;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.05rem; letter-spacing: -.01em; margin: 0 0 .2em }
.brand { margin: 0; color: var(--accent); font-weight: 650; letter-spacing: .01em }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(126px,1fr)); gap: 1px;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 14px; overflow: hidden;
}
.facts div { background: var(--card); padding: 15px 17px }
.facts strong {
  display: block; font-size: 1.6rem; line-height: 1.15; letter-spacing: -.03em; font-weight: 650;
  font-variant-numeric: tabular-nums;
}
.facts div:first-child strong { color: var(--accent) }
.facts span { color: var(--soft); font-size: .82rem; line-height: 1.3; display: block; margin-top: 3px }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 22px 24px;
  margin-top: 20px;
}
.caption { color: var(--soft); font-size: .9rem; margin: 0 0 14px; max-width: 70ch }
figure { margin: 0 }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums }
svg .label { fill: var(--ink) }
svg .final { fill: var(--second); font-weight: 650 }
.grid { stroke: var(--grid) }
.axis { stroke: var(--rule) }
path { fill: none; stroke-linejoin: round }
.raw { stroke: var(--accent); opacity: .28; stroke-width: .9 }
.train { stroke: var(--accent); stroke-width: 2.2 }
.validation { stroke: var(--second); stroke-width: 2.2 }
.dot { fill: var(--card); stroke: var(--second); stroke-width: 2 }
.ridge { fill: var(--accent); fill-opacity: .3; stroke: var(--accent); stroke-width: 1.4 }
.median { stroke: var(--ink); stroke-width: 1.6 }
.mark { stroke: var(--second); stroke-dasharray: 3 4; stroke-width: 1.4 }
em { font-style: normal; font-weight: 600 }
.k-train { color: var(--accent) }
.k-validation { color: var(--second) }
.loss { position: relative }
.loss input { position: absolute; opacity: 0 }
.loss label {
  font-size: .8rem; color: var(--soft); border: 1px solid var(--rule); border-radius: 99px;
  padding: 2px 11px; margin: 4px 6px 8px 0; display: inline-block; cursor: pointer;
}
.loss input:checked+label { color: var(--ink); background: var(--mark); border-color: transparent }
.loss input:focus-visible+label { outline: 2px solid var(--accent) }
.loss .log,#log:checked~.lin { display: none }
#log:checked~.log { display: block }
pre {
  font: 14px/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
mark { background: var(--mark); color: inherit; border-radius: 4px; padding: 1px 0 }
.heat {
  display: flex; flex-wrap: wrap; gap: 9px 0;
  font: 13px/1.25 ui-monospace,"SF Mono",Menlo,Consolas,monospace;
}
.heat span { width: 14px; text-align: center }
.heat b { font-weight: 500; display: block }
.heat i,.ramp i {
  display: block; height: 10px;
  background: color-mix(in srgb,var(--accent) calc(var(--v)*100%),var(--grid));
}
.heat i:hover { outline: 2px solid var(--second) }
.ranges {
  list-style: none; padding: 0; margin: 16px 0 0; display: flex; flex-wrap: wrap; gap: 4px 20px;
  font-size: .82rem; color: var(--soft); font-variant-numeric: tabular-nums;
}
.ranges b { color: var(--ink); font-weight: 600 }
.ramp i { display: inline-block; width: 16px }
.tables { display: grid; grid-template-columns: repeat(auto-fit,minmax(270px,1fr)); gap: 24px 40px }
table { border-collapse: collapse; width: 100%; font-size: .87rem }
th,td { border-top: 1px solid var(--grid); padding: 5px 0; text-align: left; vertical-align: top }
tr:first-child>* { border-top: 0 }
th { font-weight: 400; color: var(--soft); white-space: nowrap; padding-right: 18px }
td { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.tables+h2 { margin-top: 24px }
.command { font-size: .85rem; background: var(--mark); border-radius: 8px; padding: 10px 12px }
#tip {
  position: fixed; pointer-events: none; background: var(--ink); color: var(--paper); font-size: .78rem;
  border-radius: 6px; padding: 3px 8px; display: none; z-index: 2; white-space: nowrap;
}
@media(max-width:600px) {
  main { padding: 28px 12px 48px }
  section { padding: 18px 14px }
  .facts strong { font-size: 1.35rem }
  .facts { grid-template-columns: 1fr 1fr }
  svg text { font-size: 17.5px }
  pre { font-size: 13px }
}
@media print {
  body { background: #fff }
  section { break-inside: avoid }
}
"""

SCRIPT = """
const tip=document.body.appendChild(Object.assign(document.createElement('div'),{id:'tip'}));
document.querySelectorAll('.heat i').forEach(e=>{e.dataset.tip=e.title;e.removeAttribute('title')});
document.addEventListener('pointerover',e=>{const t=e.target.dataset&&e.target.dataset.tip;
if(!t){tip.style.display='none';return}tip.textContent=t;tip.style.display='block';
const r=e.target.getBoundingClientRect(),w=tip.offsetWidth;
tip.style.left=Math.max(4,Math.min(innerWidth-w-4,r.left+r.width/2-w/2))+'px';tip.style.top=(r.top-30)+'px'});
document.addEventListener('scroll',()=>tip.style.display='none',{passive:true});
"""
