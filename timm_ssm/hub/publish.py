"""A converted folder to a repository on the Hub."""
import json
from pathlib import Path
from typing import List, Optional, Tuple

from huggingface_hub import HfApi
from timm.models import is_model

from ..models._fetch import naming
from ..models._integrity import verify_file

FILES = ('model.safetensors', 'config.json', 'README.md')


def check(folder: Path) -> List[Tuple[str, int]]:
    """Names and sizes of the files to upload.

    Raises:
        ValueError: The folder is not what `timm-ssm convert` writes, or damaged.
    """
    folder = Path(folder)
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        raise ValueError(f'folder: {folder} has no {", ".join(missing)}, needs what `timm-ssm convert` writes')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        architecture = config['architecture']
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{folder / "config.json"}: not a timm configuration ({type(e).__name__}: {e})') from e
    if not is_model(architecture):
        raise ValueError(f'{folder / "config.json"}: there is no architecture {architecture}')
    verify_file(folder / 'model.safetensors')
    return [(f, (folder / f).stat().st_size) for f in FILES]


def push(
        folder: Path,
        repo_id: str,
        private: bool = False,
        revision: Optional[str] = None,
        message: Optional[str] = None,
) -> str:
    """Upload a folder, creating the repository and the branch where they do not exist.

    Args:
        folder: What `timm-ssm convert` wrote.
        repo_id: 'owner/name' on the Hub.
        private: Create the repository as a private one.
        revision: Branch; 'main' if None.
        message: Of the commit.

    Returns:
        Address of the commit.
    """
    check(folder)
    api = HfApi(library_name='timm-ssm')
    with naming(repo_id, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(FILES),
            commit_message=message or 'Upload model',
        ).commit_url
