"""`timm-ssm analyse`: each analysis from files to a picture, a table and the command that made them."""
import argparse
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from ..hub.classify import class_names, create_opener, find_files, load_model, takes
from ..plot.style import save, style
from ..training.evaluation import evaluating
from ..training.log import write_rows
from . import figures
from .attention import hidden_attention
from .faithfulness import Curves, deletion_insertion, grad_cam
from .field import field_sizes, receptive_field
from .figures import Panel
from .frequency import FACTORS, frequency_sensitivity
from .overlay import overlay, to_pixels
from .record import is_scan, record
from .rollout import rollout
from .steps import delta_maps, half_lives
from .tokens import TokenLayout

Rows = List[Dict[str, Any]]

MAX_SHOWN = 4  # sources that are drawn; tables have all


def short_names(args: argparse.Namespace) -> Dict[str, str]:
    """What the models are called in pictures; a checkpoint by its run."""
    names = [Path(name).parent.name if Path(name).is_file() else Path(name).name for name in args.model]
    return dict(zip(args.model, names if len(set(names)) == len(args.model) else args.model))


def models_of(args: argparse.Namespace) -> Iterator[Tuple[str, nn.Module]]:
    """Short names and models."""
    for name, label in short_names(args).items():
        yield label, load_model(name, args.device)


def read(model: nn.Module, args: argparse.Namespace) -> Tuple[List[str], torch.Tensor]:
    """The sources and a batch of them."""
    sources = find_files(model, args.source)
    opener = create_opener(model)
    return sources, torch.stack([opener(source) for source in sources]).to(args.device)


def attribution(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Rollout and Grad-CAM over the sources, and deletion and insertion curves of both and of a random map."""
    pictures: List[List[Panel]] = []
    curves: Dict[str, Curves] = {}
    rows: Rows = []
    for label, model in models_of(args):
        sources, x = read(model, args)
        names, pixels = class_names(model), to_pixels(model, x)
        with torch.no_grad():
            classes = torch.cat([model(part).argmax(-1) for part in x.split(16)])
        generator = torch.Generator().manual_seed(0)
        maps = {'rollout': torch.cat([rollout(model, part) for part in x.split(1)])}
        maps['Grad-CAM'] = torch.cat([grad_cam(model, part, c) for part, c in zip(x.split(16), classes.split(16))])
        maps['random'] = torch.rand(maps['rollout'].shape, generator=generator).to(x)
        if not pictures:
            pictures = [[Panel(Path(s).name, p)] for s, p in zip(sources[:MAX_SHOWN], pixels)]
        for kind, relevance in maps.items():
            name = f'{label}, {kind}' if len(args.model) > 1 else kind
            found = curves[name] = deletion_insertion(model, x, relevance, classes)
            rows += [
                dict(model=label, source=source, kind=kind, label=names[c], deletion=round(d, 5), insertion=round(i, 5))
                for source, c, d, i in zip(
                    sources, classes.tolist(), found.deletion_area.tolist(), found.insertion_area.tolist())]
            if kind != 'random':
                laid = overlay(pixels, relevance)
                for row, p, c in zip(pictures, laid, classes.tolist()):
                    row.append(Panel(f'{name}: {names[c]}' if kind == 'rollout' else name, p))
    return figures.draw_attribution(pictures, curves), rows


def attention(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """The hidden attention of one token of one mixer, by its magnitude."""
    (label, model), = models_of(args)
    _, x = read(model, args)
    x = x[:1]
    records = record(model, x, is_scan)
    if not -len(records) <= args.mixer < len(records):
        raise ValueError(f'--mixer: got {args.mixer}, {label} has mixers 0 to {len(records) - 1}')
    r = records[args.mixer]
    with evaluating(model), torch.no_grad():
        layout = TokenLayout(model, x)
        tokens = r.args[0][..., 0].flatten(1).shape[1]
        panels, rows = [], []
        for token in args.token:
            if not 0 <= token < tokens:
                raise ValueError(f'--token: got {token}, {r.name} of {label} has tokens 0 to {tokens - 1}')
            weights = hidden_attention(r.module, r.args[0], [token])[:, 0]
            map = layout.to_map(r, weights.abs())
            panels.append(Panel(f'token {token}', overlay(to_pixels(model, x), map)[0]))
            rows += [dict(mixer=r.name, token=token, source_token=j, attention=f'{a:.6g}')
                     for j, a in enumerate(weights[0].tolist())]
    return figures.draw_attention(to_pixels(model, x)[0], panels, f'{label}, {r.name}'), rows


def memory(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Half-lives of all states."""
    models, tokens, rows = {}, {}, []
    for label, model in models_of(args):
        _, x = read(model, args)
        models[label] = half_lives(model, x)
        tokens[label] = max(r.args[0][0, ..., 0].numel() for r in record(model, x[:1], is_scan))
        for mixer, lives in models[label].items():
            for direction, of_direction in enumerate(lives):
                for state, values in enumerate(of_direction.T):
                    quantiles = values.quantile(values.new_tensor([0, .05, .5, .95, 1])).tolist()
                    rows.append(dict(
                        model=label, mixer=mixer, direction=direction, state=state,
                        **{k: f'{v:.6g}' for k, v in zip(('shortest', '5%', 'median', '95%', 'longest'), quantiles)}))
    return figures.draw_memory(models, tokens), rows


def delta(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Step sizes: maps of the first source, and the range over all."""
    (label, model), = models_of(args)
    _, x = read(model, args)
    steps = delta_maps(model, x)
    rows = [
        dict(mixer=name, direction=d, low=f'{s.low[d]:.6g}', mean=f'{s.maps[:, d].mean():.6g}', high=f'{s.high[d]:.6g}')
        for name, s in steps.items() for d in range(len(s.low))]
    return figures.draw_deltas(to_pixels(model, x[:1])[0], steps), rows


def field(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Effective receptive fields, and the sides of the squares that hold half and 95 % of them."""
    fields, sizes, rows = {}, {}, []
    shares = [.5, .95]
    for label, model in models_of(args):
        if takes(model) != 'image':
            raise ValueError(f'--model: {label} takes clips, field needs models of images')
        _, x = read(model, args)
        for size in args.img_size or [x.shape[-1]]:
            if hasattr(model, 'set_input_size') and size != x.shape[-1]:
                model.set_input_size(img_size=size)
            resized = F.interpolate(x, (size, size), mode='bicubic', antialias=True)
            found = fields[label, size] = receptive_field(model, resized)
            sides = sizes[label, size] = field_sizes(found, shares)
            rows.append(dict(
                model=label, img_size=size, inputs=len(x), side_50=sides[0], side_95=sides[1],
                side_50_of_image=round(sides[0] / size, 4), side_95_of_image=round(sides[1] / size, 4)))
    return figures.draw_fields(fields, sizes), rows


def frequency(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Similarity of tokens when high frequencies are amplified."""
    models, rows = {}, []
    for label, model in models_of(args):
        _, x = read(model, args)
        models[label] = frequency_sensitivity(model, x, FACTORS)
        rows += [
            dict(model=label, factor=factor, depth=depth + 1, similarity=f'{value:.6g}')
            for factor, values in zip(FACTORS, models[label].tolist()) for depth, value in enumerate(values)]
    return figures.draw_frequency(models, FACTORS), rows


def order(args: argparse.Namespace) -> Tuple[Figure, Rows]:
    """Accuracy on videos whose frames are in other orders."""
    from ..training.validate import main as validate

    models: Dict[str, Dict[str, float]] = {}
    rows: Rows = []
    for name in args.model:
        path = Path(name)
        model = ['--model', f'local-dir:{name}' if path.is_dir() else name]
        flags = ['--checkpoint', name] if path.is_file() else model
        for kind in args.order:
            result, = validate([*args.source, *flags, '--frame-order', kind, '--device', args.device, *args.rest])
            label = short_names(args)[name]
            models.setdefault(label, {})[kind] = result['top1']
            rows.append(dict(result, model=label, frame_order=kind))
    return figures.draw_orders(models), rows


ANALYSES = dict(
    attribution=attribution, attention=attention, memory=memory, delta=delta, field=field, frequency=frequency,
    order=order)


def run(args: argparse.Namespace) -> List[str]:
    """Run the analysis that arguments ask for, write its picture, its table and its command, and return their paths."""
    picture = Path(args.output or f'{args.analysis}.png')
    if picture.suffix not in ('.png', '.svg', '.pdf'):
        raise ValueError(f'--output: got {picture}, needs a name in .png, .svg or .pdf')
    drawn, rows = ANALYSES[args.analysis](args)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with style():
        save(drawn, picture)
    with open(picture.with_suffix('.csv'), 'w', newline='', encoding='utf-8') as f:
        write_rows(f, rows)
    picture.with_suffix('.sh').write_text(f'{shlex.join(["timm-ssm", *args.argv])}\n', encoding='utf-8')
    return [str(picture.with_suffix(suffix)) for suffix in (picture.suffix, '.csv', '.sh')]
