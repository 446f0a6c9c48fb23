"""A Hub on this machine, as much of one as timm and huggingface_hub talk to, with faults on demand.

Files are served at /{repo}/resolve/{revision}/{file} with the headers of the real Hub; repositories are created and
written through the same requests as there (create, preupload, LFS batch, commit). `python -m tests.hub_server DIR`
serves a folder of repositories, `DIR/owner/name/file`, by hand.
"""
import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep  # the tests shorten time.sleep
from typing import Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

_MAIN = 'main'


@dataclass
class Repo:
    """A repository: its files on each branch; private ones answer only to a token."""
    files: Dict[str, Dict[str, bytes]] = field(default_factory=lambda: {_MAIN: {}})
    private: bool = False
    commits: int = 1

    def commit_hash(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`.

    `status` answers with that error, `cut_after` breaks the connection after so many bytes of the body, `body` sends
    other bytes under the old hash, `wait` lets so many seconds pass first.
    """
    path: str
    method: str = 'GET'
    times: int = 1
    status: Optional[int] = None
    cut_after: Optional[int] = None
    body: Optional[bytes] = None
    wait: float = 0.


class HubServer:
    """Serves `repos` at `url` from a thread; `requests` lists what was asked, as 'METHOD /path'."""

    def __init__(self, port: int = 0) -> None:
        self.reset()
        self._http = ThreadingHTTPServer(('127.0.0.1', port), type('Handler', (_Handler,), {'hub': self}))
        self._http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._http.server_port}'
        threading.Thread(target=self._http.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()

    def reset(self) -> None:
        """An empty, healthy Hub."""
        self.repos: Dict[str, Repo] = {}
        self.faults: List[Fault] = []
        self.requests: List[str] = []
        self.uploads: Dict[str, bytes] = {}
        self.lock = threading.Lock()

    def add(self, repo_id: str, files: Dict[str, bytes], private: bool = False) -> None:
        """Put files on the main branch of a repository."""
        repo = self.repos.setdefault(repo_id, Repo(private=private))
        repo.commits += 1
        repo.files[_MAIN].update(files)

    def fail(self, path: str, **fault) -> None:
        """Make the next requests for `path` fail, see Fault."""
        self.faults.append(Fault(path, **fault))

    def asked(self, method: str = 'GET') -> List[str]:
        """Paths asked for by a method."""
        return [r.partition(' ')[2] for r in self.requests if r.startswith(method + ' ')]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        payload = self._payload()
        with self.hub.lock:
            self.hub.requests.append(f'{self.command} {path}')
            fault = next((f for f in self.hub.faults if f.path in path and f.method == self.command), None)
            if fault:
                fault.times -= 1
                if fault.times == 0:
                    self.hub.faults.remove(fault)
        if fault:
            sleep(fault.wait)
        if fault and fault.status:
            return self._error(fault.status, 'told to fail')
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace('HEAD', 'GET'):
                groups = match.groups()
                if 'repo' in match.groupdict() and not self._allowed(match['repo']):
                    return None
                return action(self, *groups, payload=payload, fault=fault)
        return self._error(404, f'no such page: {path}')

    def _payload(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def _allowed(self, repo_id: str) -> bool:
        """The real Hub answers 401 for private repositories without a token, and for missing ones alike."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers.get('Authorization')):
            self._error(401, 'Invalid username or password.', 'RepoNotFound')
            return False
        return True

    def _reply(self, body: bytes, status: int = 200, headers: Optional[Dict[str, str]] = None) -> None:
        self.send_response(status)
        for k, v in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _json(self, value) -> None:
        self._reply(json.dumps(value).encode(), headers={'Content-Type': 'application/json'})

    def _error(self, status: int, message: str, code: str = '') -> None:
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self._reply(json.dumps({'error': message}).encode(), status, headers)

    def _files(self, repo_id: str, revision: str) -> Optional[Dict[str, bytes]]:
        repo = self.hub.repos[repo_id]
        return repo.files.get(_MAIN if revision == repo.commit_hash() else revision)

    def resolve(self, repo_id: str, revision: str, name: str, payload: bytes, fault: Optional[Fault]) -> None:
        files = self._files(repo_id, revision)
        if files is None:
            return self._error(404, f'no revision {revision}', 'RevisionNotFound')
        if name not in files:
            return self._error(404, f'no file {name}', 'EntryNotFound')
        body = files[name]
        headers = {
            'X-Repo-Commit': self.hub.repos[repo_id].commit_hash(),
            'ETag': f'"{hashlib.sha256(body).hexdigest()}"',  # as for files in large-file storage
            'Accept-Ranges': 'bytes',
        }
        if fault and fault.body is not None:
            body = fault.body
        status, start = 200, re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if start:
            status, total = 206, len(body)
            headers['Content-Range'] = f'bytes {start[1]}-{total - 1}/{total}'
            body = body[int(start[1]):]
        if fault and fault.cut_after is not None and self.command == 'GET':
            headers['Content-Length'] = str(len(body))
            self._reply(body[:fault.cut_after], status, headers)
            self.close_connection = True
            return None
        return self._reply(body, status, headers)

    def model_info(self, repo_id: str, revision: Optional[str], payload: bytes, fault: Optional[Fault]) -> None:
        files = self._files(repo_id, revision or _MAIN)
        if files is None:
            return self._error(404, f'no revision {revision}', 'RevisionNotFound')
        repo = self.hub.repos[repo_id]
        return self._json({
            'id': repo_id, 'modelId': repo_id, 'sha': repo.commit_hash(), 'private': repo.private, 'tags': [],
            'siblings': [{'rfilename': name} for name in files]})

    def tree(self, repo_id: str, revision: str, payload: bytes, fault: Optional[Fault]) -> None:
        files = self._files(repo_id, revision) or {}
        self._json([
            {'type': 'file', 'path': name, 'size': len(body), 'oid': hashlib.sha1(body).hexdigest()}
            for name, body in files.items()])

    def create_repo(self, payload: bytes, fault: Optional[Fault]) -> None:
        if not self.headers.get('Authorization'):
            return self._error(401, 'Invalid username or password.')
        asked = json.loads(payload)
        repo_id = '/'.join(filter(None, (asked.get('organization', 'me'), asked['name'])))
        if repo_id in self.hub.repos:
            body = {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{repo_id}'}
            return self._reply(json.dumps(body).encode(), 409)
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.repos[repo_id] = Repo(private=bool(private))
        return self._json({'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def create_branch(self, repo_id: str, branch: str, payload: bytes, fault: Optional[Fault]) -> None:
        files = self.hub.repos[repo_id].files
        if branch in files:
            return self._error(409, f'Reference already exists: {branch}')
        files[branch] = dict(files[_MAIN])
        return self._json({})

    def preupload(self, repo_id: str, revision: str, payload: bytes, fault: Optional[Fault]) -> None:
        if self._files(repo_id, revision) is None:
            return self._error(404, f'no revision {revision}', 'RevisionNotFound')
        return self._json({'files': [
            {'path': f['path'], 'shouldIgnore': False,
             'uploadMode': 'lfs' if f['path'].endswith(('.safetensors', '.pth')) else 'regular'}
            for f in json.loads(payload)['files']]})

    def lfs_batch(self, repo_id: str, payload: bytes, fault: Optional[Fault]) -> None:
        objects = json.loads(payload)['objects']
        for o in objects:
            if o['oid'] not in self.hub.uploads:
                o['actions'] = {'upload': {'href': f'{self.hub.url}/upload/{o["oid"]}'}}
        self._json({'transfer': 'basic', 'objects': objects})

    def upload(self, oid: str, payload: bytes, fault: Optional[Fault]) -> None:
        if hashlib.sha256(payload).hexdigest() != oid:
            return self._error(400, 'the content does not have this hash')
        self.hub.uploads[oid] = payload
        return self._json({})

    def commit(self, repo_id: str, revision: str, payload: bytes, fault: Optional[Fault]) -> None:
        repo, files = self.hub.repos[repo_id], self._files(repo_id, revision)
        if files is None:
            return self._error(404, f'no revision {revision}', 'RevisionNotFound')
        new = {}
        for line in payload.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                new[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                if value['oid'] not in self.hub.uploads:
                    return self._error(400, f'{value["path"]} was not uploaded')
                new[value['path']] = self.hub.uploads[value['oid']]
        files.update(new)
        repo.commits += 1
        return self._json({
            'success': True, 'commitOid': repo.commit_hash(),
            'commitUrl': f'{self.hub.url}/{repo_id}/commit/{repo.commit_hash()}', 'hookOutput': ''})

    def validate_yaml(self, payload: bytes, fault: Optional[Fault]) -> None:
        self._json({'errors': [], 'warnings': []})

    def whoami(self, payload: bytes, fault: Optional[Fault]) -> None:
        if not self.headers.get('Authorization'):
            return self._error(401, 'Invalid username or password.')
        return self._json({'type': 'user', 'name': 'me', 'orgs': []})


_REPO = r'/?(?P<repo>[^/]+/[^/]+)'
_ROUTES: List[Tuple[str, str, object]] = [
    ('GET', rf'{_REPO}/resolve/([^/]+)/(.+)', _Handler.resolve),
    ('GET', rf'/api/models{_REPO}(?:/revision/([^/]+))?', _Handler.model_info),
    ('GET', rf'/api/models{_REPO}/tree/([^/]+)', _Handler.tree),
    ('GET', r'/api/whoami-v2', _Handler.whoami),
    ('POST', r'/api/repos/create', _Handler.create_repo),
    ('POST', r'/api/validate-yaml', _Handler.validate_yaml),
    ('POST', rf'/api/models{_REPO}/branch/([^/]+)', _Handler.create_branch),
    ('POST', rf'/api/models{_REPO}/preupload/([^/]+)', _Handler.preupload),
    ('POST', rf'/api/models{_REPO}/commit/([^/]+)', _Handler.commit),
    ('POST', rf'{_REPO}\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    ('PUT', r'/upload/([0-9a-f]+)', _Handler.upload),
]


def main(folder: str) -> None:
    hub = HubServer()
    for path in sorted(Path(folder).glob('*/*/**/*')):
        if path.is_file():
            owner, name, *file = path.relative_to(folder).parts
            hub.add(f'{owner}/{name}', {'/'.join(file): path.read_bytes()})
    print(f'serving {", ".join(hub.repos)}: HF_ENDPOINT={hub.url}', flush=True)
    threading.Event().wait()


if __name__ == '__main__':
    main(*sys.argv[1:])
