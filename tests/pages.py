"""Trees and texts that pages of them are tested with."""

import math

import torch

from search.tree import Tree

# every one of them would set window.hit, or end the script it stands in, if it were taken as markup
HOSTILE = [
    "</script><script>window.hit=1</script>",
    "</SCRIPT ><script>window.hit=1</script>",
    "<!--<script>window.hit=1",
    "--><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<img src=x onerror='alert(1)'>",
    "<svg onload=window.hit=1>",
    "<svg><script>window.hit=1</script></svg>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<iframe src=javascript:parent.hit=1></iframe>",
    "<body onload=window.hit=1>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "<meta http-equiv=refresh content='0;url=javascript:window.hit=1'>",
    "<base href=//example.org/>",
    "<a href=javascript:window.hit=1>x</a>",
    "<details open ontoggle=window.hit=1>",
    "<input autofocus onfocus=window.hit=1>",
    "<template><script>window.hit=1</script></template>",
    "</option></select><img src=x onerror=window.hit=1>",
    "</title><script>window.hit=1</script>",
    "</textarea></noscript><script>window.hit=1</script>",
    "javascript:window.hit=1",
    "\"'`;window.hit=1;//",
    '"}]};window.hit=1;({"',
    "\\u003cscript>window.hit=1\\u003c/script>",
    "\\",
    '\\";window.hit=1;//',
    "&lt;script&gt;window.hit=1&lt;/script&gt; &amp; &#60;img src=x onerror=window.hit=1&#62;",
    "${window.hit=1} {{constructor.constructor('window.hit=1')()}} __DATA__ %s",
    "line\u2028window.hit=1\u2029paragraph\u0085next",
    "new\nline\r\n\ttab\x00nul\x1b[31m\x7f",
    "lone \ud800 surrogates \udfff",
    "\u202eright to left\u202c שלום سلام \u2066<b>\u2069",
    "\ufeff\u200b\u200d zero width",
    "👩‍👩‍👧 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 é Ω ﷽",
    "__proto__",
    "constructor",
    "",
    "   ",
    "long " * 2_000,
    "<b>" * 5_000,
]


def grown_tree(sizes, steps=(0, 20, 40, 50), seed=0, failed=0) -> Tree:
    """One random tree per size, of at least so many nodes, planted walk by walk as samplers do;
    values are the best reward below. The last `failed` leaves of each have failed."""
    random = torch.Generator().manual_seed(seed)
    parent, step, row, dead = [], [], [], []
    for r, size in enumerate(sizes):
        first = len(parent)
        parent.append(-1)
        step.append(-1)
        while len(parent) - first < size:
            at = first + int(torch.randint(len(parent) - first, (), generator=random))
            at = parent[at] if step[at] == steps[-1] else at
            for s in [s for s in steps if s > step[at]]:
                parent.append(at)
                step.append(s)
                at = len(parent) - 1
        row += [r] * (len(parent) - first)
        leaves = [n for n in range(first, len(parent)) if step[n] == steps[-1]]
        dead += leaves[len(leaves) - failed :]
    m = len(parent)
    draws = torch.randn(m, generator=random, dtype=torch.float64).tolist()
    reward, visits = [math.nan] * m, [0] * m
    for n in range(m):
        if step[n] == steps[-1] and n not in dead:
            reward[n], visits[n] = draws[n], 1
    value = list(reward)
    for n in reversed(range(m)):
        if parent[n] >= 0 and not math.isnan(value[n]):
            visits[parent[n]] += visits[n]
            above = value[parent[n]]
            value[parent[n]] = value[n] if math.isnan(above) else max(above, value[n])
    reward = torch.tensor(reward, dtype=torch.float64)
    return Tree(
        parent=torch.tensor(parent),
        step=torch.tensor(step),
        handle=torch.arange(m) + 100,
        row=torch.tensor(row),
        value=torch.tensor(value, dtype=torch.float64),
        visits=torch.tensor(visits),
        reward=reward,
        failed=torch.isin(torch.arange(m), torch.tensor(dead, dtype=torch.int64)),
        log_ratio=torch.zeros(m, dtype=torch.float64),
        log_w=torch.where(reward.isfinite(), 0.0, -torch.inf).double(),
        ended=torch.bincount(torch.tensor(row)[reward.isfinite()], minlength=len(sizes)),
        lam=2.0,
    )


def noise(handles):
    """A colour image of its own for every handle."""
    return torch.stack(
        [
            torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(h))
            for h in handles.tolist()
        ]
    )
