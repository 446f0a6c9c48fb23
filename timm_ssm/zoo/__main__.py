"""Write all that is generated from the models and the published figures, in a checkout of the repository.

    python -m timm_ssm.zoo

writes timm_ssm/zoo/counted.json, docs/models.md and, for every pretrained tag, hub_configs/<model>.<tag>/config.json
and README.md. What people wrote in the model cards outside of their generated sections stays.
"""
import sys
from pathlib import Path

from tqdm import tqdm

from . import cards, model_table, registry

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ROOT / 'timm_ssm' / 'zoo' / 'counted.json'
TABLE = ROOT / 'docs' / 'models.md'
HUB_CONFIGS = ROOT / 'hub_configs'


def main() -> None:
    if not TABLE.exists():
        sys.exit(f'python -m timm_ssm.zoo: {ROOT} is not a checkout of the repository')
    names = registry.list_names(include_tags=True)
    rows = [model_table.row(name) for name in tqdm(names, 'counting', disable=None)]
    COUNTED.write_text(model_table.counted(rows), encoding='utf-8')  # before the cards, which give its figures
    TABLE.write_text(model_table.document(rows), encoding='utf-8')
    for name in tqdm(registry.list_names(pretrained=True), 'model cards', disable=None):
        for path, text in cards.generate(name, HUB_CONFIGS).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
