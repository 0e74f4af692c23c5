"""The look of the report: one style sheet for wide and narrow, light and dark."""

STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--text:#1c1d1f;--soft:#63666b;--rule:#e3e4e6;--grid:#ebecee;--good:#1a7f4b;
--code:#f3f4f5;--c0:#2468c4;--c1:#c8561b;--c2:#1f8a6d;--c3:#8b4fc0;--c4:#b0831a;--c5:#c23c6e}
@media(prefers-color-scheme:dark){:root{--bg:#131416;--card:#1b1d20;--text:#e7e8ea;--soft:#a0a4aa;--rule:#303338;
--grid:#272a2e;--good:#5cc490;--code:#232629;--c0:#74a9f2;--c1:#f0905a;--c2:#5cc4a4;--c3:#c197ea;--c4:#dcb457;
--c5:#ee86ab}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans",
"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:44px 0 12px;padding-top:20px;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:24px 0 8px}
p{margin:8px 0}
small,.soft{color:var(--soft);font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:1.4rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.875rem}
.bar{display:flex;height:14px;border-radius:7px;overflow:hidden;gap:2px;margin:8px 0}
.bar i{display:block;min-width:3px}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:.8125rem;
color:var(--soft)}
ul.legend b{color:var(--text);font-weight:600;font-variant-numeric:tabular-nums}
ul.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:left;font-size:.8125rem}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--rule);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px;margin:12px 0}
figure.chart{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 8px;
min-width:0;display:flex;flex-direction:column}
figcaption{font-weight:600;font-size:.9375rem;margin-bottom:4px}
figcaption small{font-weight:400}
.plot{margin-top:auto;padding-top:8px;display:grid;grid-template:200px 22px/46px 1fr}
.plot svg{width:100%;height:100%;overflow:visible;display:block}
.plot .y,.plot .x{position:relative;font-size:.75rem;color:var(--soft);font-variant-numeric:tabular-nums}
.plot .y span{position:absolute;right:8px;transform:translateY(50%)}
.plot .x{grid-column:2}
.plot .x span{position:absolute;top:4px;transform:translateX(-50%)}
.unit{margin:0;text-align:right;font-size:.75rem;color:var(--soft)}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
path.grid{stroke:var(--grid);stroke-width:1}
path.line{stroke-width:2}
path.faint{stroke-width:1;opacity:.35}
path.dot{stroke-width:7}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
path.c3{stroke:var(--c3)}path.c4{stroke:var(--c4)}path.c5{stroke:var(--c5)}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}
i.c3{background:var(--c3)}i.c4{background:var(--c4)}i.c5{background:var(--c5)}
.samples{display:grid;gap:12px}
.sample{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;min-width:0}
.sample .prompt{font-weight:600;margin:0 0 8px}
.sample dl{display:grid;grid-template-columns:5.2em 1fr;gap:4px 10px;margin:0}
.sample dt{color:var(--soft);font-size:.8125rem;padding-top:2px}
.sample dd{margin:0;min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:7.5em;overflow-y:auto}
.right{color:var(--good);font-weight:600}
pre{background:var(--code);border-radius:6px;padding:10px 12px;margin:6px 0;overflow-x:auto;font:.8125rem/1.5
ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:12px 0}summary{cursor:pointer;color:var(--soft)}
@media(max-width:520px){main{padding:20px 14px 40px}h1{font-size:1.4rem}.plot{grid-template-rows:170px 22px}
.tiles{grid-template-columns:1fr 1fr}.sample dl{grid-template-columns:1fr}.sample dt{margin-top:4px}}
"""
