"""Count the parameters and multiply-accumulates of every model and compare them with the published ones.

Nothing is computed or downloaded: models are built on the meta device. `python -m timm_ssm.zoo` writes docs/models.md
and counted.json with it.
"""
import json
from typing import Dict, List, Optional, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from .datasets import DATASETS, trained_on
from .published import PARAMS, PUBLISHED, REMARKS, UNCOUNTED_OPS
from .registry import input_shape

PARTS = {
    'scan': 'the selective scan',
    'x_proj': 'the projection to dt, B and C',
    'dt_proj': 'the projection of dt',
    'attention': 'the two matrix products of attention',
}
INTRODUCTION = '''# Models

Written by `python -m timm_ssm.zoo`; do not edit.

Parameters and GMACs (10⁹ multiply-accumulates in a forward pass of one image or one clip) are counted from the models
as they are built here, and stand beside the published figures. GMACs count convolutions, linear layers, attention and
the selective scan (9 B L D N floating-point operations a direction, B L D for the skip and for the gate, halved). Some
published figures leave operations out; the column *same operations* counts ours without these, for comparison:

{uncounted}

{remarks}

Top-1 accuracies, in per cent, are those published by the authors named; none is measured here. For clips they are
averages over several views, so that a prediction costs several times the GMACs of the table. A dash: not published.
Where no weights are public, there are none under *weights*.

{licences}

'''
COLUMNS = [
    'model', 'weights', 'input', 'M params', 'published', 'GMACs', 'same operations', 'published', 'top-1', 'on',
    'published by']
RIGHT = ('M params', 'published', 'GMACs', 'same operations', 'top-1')


def count(name: str, shape: Tuple[int, ...]) -> Tuple[int, Dict[str, float]]:
    """Parameters of a model, and its GMACs for an input: all of them under 'total', and those of each of PARTS."""
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device='meta'))
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()['Global'].items()}
    flops = dict.fromkeys(PARTS, 0)
    flops['total'] = counter.get_total_flops()
    flops['scan'] = by_op.get('timm_ssm.selective_scan', 0)
    flops['attention'] = by_op.get('aten.bmm', 0)  # what scaled_dot_product_attention is made of on meta
    for module, ops in counter.get_flop_counts().items():
        leaf = module.rpartition('.')[2].removesuffix('_b')
        if leaf in ('x_proj', 'dt_proj'):
            flops[leaf] += sum(ops.values())
    return sum(p.numel() for p in model.parameters()), {k: v / 2e9 for k, v in flops.items()}


def published_params(architecture: str) -> Optional[float]:
    """Millions of parameters, of the longest beginning of the name that is listed."""
    parts = architecture.split('_')
    beginnings = ('_'.join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((PARAMS[b] for b in beginnings if b in PARAMS), None)


def row(name: str) -> Dict[str, object]:
    """The numbers of one model, or of one pretrained tag of it."""
    architecture, _, tag = name.partition('.')
    cfg = get_pretrained_cfg(name)
    shape = input_shape(name)
    params, gmacs = count(name, shape)
    uncounted = UNCOUNTED_OPS.get(architecture.partition('_')[0], ())
    dataset = 'k400' if len(shape) == 4 else 'in1k'
    if cfg.has_weights:
        dataset = trained_on(tag)[-1]
    return dict(
        name=name,
        architecture=architecture,
        tag=tag if cfg.has_weights else '',
        shape=shape,
        dataset=DATASETS[dataset].abbreviation,
        params=params,
        gmacs=gmacs['total'],
        same_gmacs=gmacs['total'] - sum(gmacs[part] for part in uncounted),
        published_params=published_params(architecture),
        published=PUBLISHED.get(name),
    )


def cells(r: Dict[str, object]) -> List[str]:
    """A row's text, column by column."""
    published = r['published']
    by = ''
    if published and published.top1:
        by = f'{published.by} ({published.note})' if published.note else published.by
    return [
        f'`{r["architecture"]}`',
        f'`.{r["tag"]}`' if r['tag'] else '',
        '×'.join(str(n) for n in r['shape'][1:]),
        f'{r["params"] / 1e6:.2f}',
        f'{r["published_params"]:g}' if r['published_params'] else '–',
        f'{r["gmacs"]:.2f}',
        *((f'{r["same_gmacs"]:.2f}', f'{published.gmacs:g}') if published and published.gmacs else ('–', '–')),
        f'{published.top1:.1f}' if published and published.top1 else '–',
        r['dataset'],
        by,
    ]


def document(rows: List[Dict[str, object]]) -> str:
    """The page docs/models.md."""
    uncounted = '\n'.join(
        f'- {family}: without {", ".join(PARTS[p] for p in parts)}' for family, parts in UNCOUNTED_OPS.items())
    lines = [COLUMNS, ['---:' if c in RIGHT else '---' for c in COLUMNS], *map(cells, rows)]
    text = INTRODUCTION.format(uncounted=uncounted, remarks=REMARKS['counts'], licences=REMARKS['licences'])
    return text + ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def counted(rows: List[Dict[str, object]]) -> str:
    """The file counted.json: parameters and GMACs of each model with tag."""
    lines = (f'  {json.dumps(r["name"])}: {json.dumps([r["params"], round(r["gmacs"], 2)])}' for r in rows)
    return '{\n' + ',\n'.join(lines) + '\n}\n'
