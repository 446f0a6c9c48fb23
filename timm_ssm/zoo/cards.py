"""The files that describe a checkpoint on the Hub: config.json, in timm's format, and README.md, the model card.

A card's generated sections lie between markers and are rewritten; what people write before, between and after them
stays.
"""
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from timm.models import model_entrypoint
from torch import nn

from .datasets import DATASETS, tag_class_names, trained_on
from .published import CITATIONS, PUBLISHED
from .registry import clip_args, counted, meta_model, num_frames

# licences under names of the Hub's own; any other is `other` with a name there
_HUB_LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0')


def model_config(
        name: str,
        model: nn.Module,
        model_args: Optional[Dict[str, Any]] = None,
        label_names: Optional[List[str]] = None,
) -> Dict[str, Any]:
    """The content of config.json.

    Args:
        name: Pretrained tag, or model for weights of other origin.
        model: The model, with or without values.
        model_args: Arguments in which the model differs from its defaults.
        label_names: Names of the classes, in order; if None the model's own, or those of the tag's dataset. timm knows
            ImageNet's.
    """
    model_args, cfg = dict(model_args or {}), dict(model.pretrained_cfg)
    label_names = label_names or cfg.pop('label_names', None) or tag_class_names(name.partition('.')[2])
    for key in ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture'):
        cfg.pop(key, None)
    if '.' not in name:  # these describe the tag's weights, not the ones at hand
        for key in ('tag', 'origin_url', 'license', 'notes', 'description'):
            cfg.pop(key, None)
    num_classes = model_args.pop('num_classes', cfg['num_classes'])
    size = model_args.get('img_size', cfg['input_size'][1:])
    size = (size, size) if isinstance(size, int) else size
    in_chans, frames = model_args.get('in_chans', cfg['input_size'][0]), num_frames(model)
    cfg.update(num_classes=num_classes, input_size=[in_chans, *size])
    if 'test_input_size' in cfg:
        cfg['test_input_size'] = [in_chans, frames, *size] if frames > 1 else cfg['input_size']
    for key in ('mean', 'std'):
        if len(cfg[key]) != in_chans:
            cfg[key] = [sum(cfg[key]) / len(cfg[key])] * in_chans
    config = dict(
        architecture=name.partition('.')[0],
        num_classes=num_classes,
        num_features=model.num_features,
        global_pool=getattr(model.global_pool, 'pool_type', model.global_pool),  # a module, or its name
        pretrained_cfg=cfg,
    )
    if hasattr(model, 'clip_args') or ('.' in name and frames > 1):
        # not in the pretrained_cfg, where timm knows all keys
        config['clip_args'] = {key: value for key, value in clip_args(model).items() if value is not None}
    if label_names:
        config['label_names'] = list(label_names)
    if model_args:  # without num_classes, which transformers' TimmWrapper passes by itself
        config['model_args'] = model_args
    return config


def to_json(config: Dict[str, Any]) -> str:
    """config.json as text."""
    return json.dumps(config, indent=2) + '\n'


def card(name: str, config: Dict[str, Any], model: nn.Module) -> str:
    """The model card: name and model as of `model_config`, which gave the config."""
    cfg, (architecture, _, tag) = config['pretrained_cfg'], name.partition('.')
    published = PUBLISHED.get(name)
    datasets, paper_id = [DATASETS[d].name for d in trained_on(tag)], cfg['paper_ids'].removeprefix('arXiv:')
    params, frames = sum(p.numel() for p in model.parameters()), num_frames(model)
    task = 'video-classification' if frames > 1 else 'image-classification'
    family = sys.modules[model_entrypoint(architecture).__module__].__doc__.partition('\n')[0].rstrip('.')

    license_name = cfg.get('license')
    header = [
        'tags:', f'- {task}', '- timm', '- mamba', '- state-space-model', f'pipeline_tag: {task}', 'library_name: timm']
    if license_name in _HUB_LICENSES:
        header.append(f'license: {license_name}')
    elif license_name:
        header += ['license: other', f'license_name: {license_name}']
    if datasets:
        header += ['datasets:', *(f'- {d.lower().replace(" ", "-")}' for d in datasets)]

    content = f'clips of {frames} frames' if frames > 1 else 'images'
    size = ' × '.join(str(s) for s in cfg['input_size'][1:])
    details = [
        f'- **Architecture:** {architecture} of `timm-ssm`. {family}.',
        f'- **Parameters:** {params:,} ({params / 1e6:.1f} M)',
        f'- **Input:** {content} of {size} pixels, {config["num_classes"]} classes',
        f'- **Paper:** {cfg["paper_name"]}, https://arxiv.org/abs/{paper_id}',
    ]
    if name in counted():
        gmacs = counted()[name][1]
        theirs = f'; {published.gmacs:g} as published' if published and published.gmacs else ''
        details.insert(2, f'- **GMACs:** {gmacs:.2f}, counted in this implementation, scan included{theirs}')
    if datasets:
        details.append(f'- **Trained on:** {", then ".join(datasets)}')
    if cfg.get('origin_url'):
        details.append(f'- **Weights and original code:** {cfg["origin_url"]}, by the paper\'s authors')
    if license_name:
        non_commercial = ': not for commercial use' if re.search(r'\bnc\b', license_name.lower()) else ''
        details.append(f'- **Licence of the weights:** {license_name}{non_commercial}')
    details += [f'- **Note:** {note}' for note in cfg.get('notes') or ()]

    results = 'No accuracy of these weights is recorded here; see the paper.' if tag else 'Not measured.'
    if published and published.top1 is not None:
        note = f' ({published.note})' if published.note else ''
        results = (f'| {datasets[-1]} top-1 | published by |\n| --- | --- |\n'
                   f'| {published.top1:.1f} % | {published.by}{note} |')

    if frames > 1:
        run = f'x = torch.randn(1, 3, {frames}, {cfg["input_size"][1]}, {cfg["input_size"][2]})  # a clip'
        imports = 'import timm, timm_ssm, torch'
    else:
        run = "x = transform(PIL.Image.open('image.jpg').convert('RGB')).unsqueeze(0)"
        imports = 'import timm, timm_ssm, PIL.Image'
    source = name if tag else 'local-dir:.'
    lines = [imports, f"model = timm.create_model('{source}', pretrained=True).eval()"]
    if frames == 1:
        lines.append('transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))')
    usage = '\n'.join([*lines, run, 'probabilities, classes = model(x).softmax(-1).topk(5)'])

    citation = CITATIONS.get(paper_id, (
        f'@misc{{arxiv:{paper_id},\n  title={{{cfg["paper_name"]}}},\n  eprint={{{paper_id}}},\n'
        '  archivePrefix={arXiv}\n}'))

    install = 'With `timm-ssm` installed (`pip install .` in a checkout of its repository):'
    sections = dict(
        header='\n'.join(header),
        title=f'# Model card for {name}',
        details='## Model details\n\n' + '\n'.join(details),
        results='## Results\n\n' + results,
        usage=f'## Usage\n\n{install}\n\n```python\n{usage}\n```',
        citation=f'## Citation\n\n```bibtex\n{citation}\n```',
    )
    marked = {k: _mark(k, v) for k, v in sections.items()}
    return f'---\n{marked.pop("header")}\n---\n\n' + '\n\n'.join(marked.values()) + '\n'


def _mark(section: str, text: str) -> str:
    if section == 'header':  # YAML
        return f'# generated: header\n{text}\n# end of generated header'
    return f'<!-- generated: {section} -->\n{text}\n<!-- end of generated {section} -->'


_SECTION = re.compile(
    r'(?:<!-- |# )generated: (?P<name>\w+)(?: -->)?\n.*?(?:<!-- |# )end of generated (?P=name)(?: -->)?', re.DOTALL)


def merge(old: str, new: str) -> str:
    """Put a new card's generated sections into the old one, which keeps the rest of its text.

    Raises:
        ValueError: The old card lacks one of the sections.
    """
    sections = {m['name']: m[0] for m in _SECTION.finditer(new)}
    missing = set(sections) - {m['name'] for m in _SECTION.finditer(old)}
    if missing:
        raise ValueError(
            f'README.md has lost the markers of its generated sections ({", ".join(sorted(missing))}); '
            'restore them, or remove the file to have it written anew')
    return _SECTION.sub(lambda m: sections.get(m['name'], m[0]), old)


def generate(name: str, folder: Path) -> Dict[Path, str]:
    """The files of a pretrained tag in folder/<model>.<tag>, as they should be."""
    model = meta_model(name)
    config = model_config(name, model)
    readme, text = folder / name / 'README.md', card(name, config, model)
    if readme.exists():
        text = merge(readme.read_text(encoding='utf-8'), text)
    return {folder / name / 'config.json': to_json(config), readme: text}
