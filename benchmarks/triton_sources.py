"""Which sources of the Triton kernels compile_triton.py has last compiled, without importing PyTorch."""
import hashlib
import io
import json
import tokenize
from pathlib import Path
from typing import Dict

SOURCES = Path(__file__).parents[1] / 'timm_ssm' / 'ops' / 'backends' / 'triton'
RECORD = Path(__file__).parent / 'results' / 'triton_compiled.json'


def sources() -> Dict[str, str]:
    """A digest of each source that has kernels, comments and layout aside."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    digests = {}
    for path in sorted(SOURCES.glob('*.py')):
        source = path.read_text()
        if '@triton.jit' in source:
            tokens = tokenize.generate_tokens(io.StringIO(source).readline)
            text = ' '.join(token.string for token in tokens if token.type not in skipped)
            digests[path.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digests


def compiled() -> bool:
    """Whether the record is of the present sources."""
    return json.loads(RECORD.read_text())['sources'] == sources()
