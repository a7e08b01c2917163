"""The look of a report's page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6474; --page: #ffffff; --card: #f4f6f9; --line: #d9dee6;
  --bar: #3b82c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --soft: #9aa4b5; --page: #12151b; --card: #1b2029; --line: #323a47; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem; color: var(--ink);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: var(--soft); margin: .3rem 0 .8rem; font-size: .9rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); }
.tile { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span, .tile small { color: var(--soft);
  font-size: .82rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: .6rem; padding: .5rem; color: var(--ink); min-width: 0; }
figure.network { max-width: 44rem; }
figure.one { max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
figcaption { margin: .3rem .3rem 0; }
img { max-width: 100%; background: #fff; border-radius: .6rem; }
i { font-style: normal; } .down { color: #c0392b; } .up { color: #1e9d50; } .off { color: #7f8c8d; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .82rem; color: var(--soft); margin-bottom: .6rem;
  max-width: 30rem; }
.scale div { flex: 1; height: .7rem; border-radius: .35rem;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
details, .still { border-bottom: 1px solid var(--line); padding: .45rem 0; margin: 0; color: inherit;
  font-size: .95rem; }
summary { cursor: pointer; } summary b, .still b { margin-right: .5rem; } .still { padding-left: 1.05rem;
  color: var(--soft); }
ul { margin: .4rem 0; padding-left: 1.4rem; } li { margin: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; overflow-wrap: normal; }
  th { text-align: left; }
th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
.clock { width: 100%; max-width: 44rem; } .n { text-align: right; white-space: nowrap; } .bar { width: 45%; }
.bar div { height: .7rem; min-width: 1px; background: var(--bar); border-radius: .2rem; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .3rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-wrap; font-family: ui-monospace, monospace;
  font-size: .85rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
  th, td { padding-right: .6rem; } }
"""
"""CSS for a phone and a desk, and for both colour schemes; drawings take the colour of the text around them."""
