"""An answer that tries whatever makes a page run or fetch something."""

LEAK = "http://127.0.0.1:9/leak"
HOSTILE = (
    f"""
<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> <img src="{LEAK}/1">
<svg onload="window.hacked = 3"><a xlink:href="javascript:window.hacked = 4">vector</a></svg>
<iframe srcdoc="<script>parent.hacked = 5</script>" src="{LEAK}/2"></iframe>
<style>@import "{LEAK}/3"; body {{ background: url({LEAK}/4); display: none }}</style>
<link rel=stylesheet href="{LEAK}/5"><meta http-equiv=refresh content="0;url={LEAK}/6">
<details open ontoggle="window.hacked = 7"><summary>more</summary></details>
<video src="{LEAK}/7" autoplay></video><object data="{LEAK}/8"></object>

[inline](javascript:window.hacked=8) [angle](<javascript:window.hacked=9>) [ref][ref]
[data](data:text/html,<script>window.hacked=10</script>) <javascript:window.hacked=11>

![pixel]({LEAK}/9) ![far][far] [![both]({LEAK}/10)](javascript:window.hacked=12)

[ref]: javascript:window.hacked=13
[far]: {LEAK}/11

$\\href{{javascript:window.hacked=14}}{{x}}$ $\\includegraphics{{{LEAK}/12}}$

```mermaid
graph TD; A["<img src={LEAK}/13 onerror=window.hacked=15>"]; click A "javascript:window.hacked=16"
```

```"><img src={LEAK}/14 onerror=window.hacked=17>
code
```
"""
    + "<div class=jp-Dialog><table><tr><td onclick=window.hacked=18>" * 1_000
)
