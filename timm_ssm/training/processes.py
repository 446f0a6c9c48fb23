"""The processes of a run: joining them, locking its folder, stopping them after the same step."""
import argparse
import glob
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import count
from typing import IO, Any, Callable, Dict, Iterable, Iterator, Optional

import torch
from timm import utils
from timm.models import safe_model_name

from .log import setup_logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = '.lock'

_logger = logging.getLogger(__name__)


def setup_process(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if any, and select this one's device; sets `args.rank` and its like."""
    for module in args.device_modules or ():
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    setup_logging(utils.is_primary(args))
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
    _logger.info(f'Process {args.rank} of {args.world_size} on {device}.')
    restarts, shared = (os.environ.get(f'TORCHELASTIC_{key}') for key in ('MAX_RESTARTS', 'USE_AGENT_STORE'))
    if int(restarts or 0) and shared == 'True' and utils.is_primary(args):
        _logger.warning(
            'torchrun --max-restarts: a group that is started again can fail on what the first left in the store; '
            'it needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and --standalone or --rdzv-backend c10d')
    return device


def decide_once(args: argparse.Namespace, decide: Callable[[], Any]) -> Any:
    """Let the first process decide for all of them; where it exits, all do, and only it says why."""
    result = error = None
    if utils.is_primary(args):
        try:
            result = decide()
        except SystemExit as e:
            error = e
    if args.distributed:
        shared = [result, error is not None]
        torch.distributed.broadcast_object_list(shared)
        result, failed = shared
        if failed and error is None:
            sys.exit(1)
    if error is not None:
        raise error
    return result


@contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[str]:
    """The folder of a run, locked against other runs; removed again if nothing is written there."""
    lock = None

    def open_folder() -> str:
        nonlocal lock
        folder = os.path.join(args.output, args.experiment) if args.experiment else make_folder(args)
        lock = lock_folder(folder)
        return folder

    folder = decide_once(args, open_folder)
    try:
        yield folder
    finally:
        if lock is not None:
            if os.listdir(folder) == [LOCK]:
                os.remove(os.path.join(folder, LOCK))
                with suppress(OSError):  # the next run is there already
                    os.rmdir(folder)
            lock.close()


def make_folder(args: argparse.Namespace) -> str:
    """A new folder, named by time and model."""
    name = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
    for i in count(1):
        folder = os.path.join(args.output, name if i == 1 else f'{name}-{i}')
        with suppress(FileExistsError):
            os.makedirs(folder)
            return folder


def lock_folder(folder: str) -> IO:
    """Lock a folder against other runs until the returned file is closed or the process ends."""
    path = os.path.join(folder, LOCK)
    while True:
        os.makedirs(folder, exist_ok=True)
        with suppress(FileNotFoundError):  # deleted by the run that had it, which has just ended
            lock = open(path, 'a+')  # noqa: SIM115
            if not try_lock(lock):
                lock.seek(0)
                sys.exit(
                    f'{folder}: another run is training there ({lock.read() or "just started"}); wait until it has '
                    f'ended, or choose another --experiment')
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    for leftover in glob.glob(os.path.join(glob.escape(folder), '*.tmp')):  # of a run that was killed
        os.remove(leftover)
    return lock


def try_lock(file: IO) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, loading processes do not inherit this lock
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        _logger.warning(f'{file.name} cannot be locked ({e.strerror}): nothing keeps a second run out of its folder')
    return True


class Stopped(Exception):
    """A signal ended training before its last epoch; the state is saved."""

    def __init__(self, signal: signal.Signals):
        super().__init__(signal.name)
        self.exit_code = 128 + signal


class StopSignal:
    """Stops the processes of a run after the same step.

    Any of them is asked by SIGTERM, which batch systems send some time before they kill, by Ctrl-C or, if it runs under
    torchrun, by torchrun's death. A second Ctrl-C is a KeyboardInterrupt.
    """

    def __init__(self, args: argparse.Namespace):
        self.primary = utils.is_primary(args)
        self.received: Optional[signal.Signals] = None
        self.group = torch.distributed.new_group(backend='gloo') if args.distributed else None
        self.parent = os.getppid() if args.distributed and torch.distributed.is_torchelastic_launched() else None
        self.previous: Dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'StopSignal':
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.previous = {s: signal.signal(s, self.receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT and self.primary:
            os.write(2, b'\nCtrl-C: ends after this step; again to end at once\n')  # print may be what was interrupted

    def asked(self) -> Optional[signal.Signals]:
        """The signal that this process received, if any."""
        if self.parent is not None and self.parent != os.getppid():
            return signal.SIGTERM
        return self.received

    def agreed(self) -> Optional[signal.Signals]:
        """The signal that any process received, if any; all processes must call this after the same step."""
        if self.group is None:
            return self.asked()
        number = torch.tensor(self.asked() or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return signal.Signals(int(number)) if number else None

    def cut(self, batches: Iterable) -> Iterator:
        """Yield batches, at least one, until this process receives a signal."""
        for batch in batches:
            yield batch
            if self.asked():
                return


def leave_signals_to_parent(loader: Any) -> None:
    """Make loading processes ignore signals that go to every process, so that what they load for can end its step."""
    loader = getattr(loader, 'loader', loader)  # timm's prefetcher and ClipLoader have a DataLoader in them
    loader.worker_init_fn = partial(init_loading_process, init=loader.worker_init_fn)


def init_loading_process(worker_id: int, init: Optional[Callable[[int], None]]) -> None:
    if init is not None:
        init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=wait_for_end, daemon=True).start()


def wait_for_end() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():  # batch systems send it to every process
        pass
    os._exit(0)
