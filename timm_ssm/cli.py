"""`timm-ssm`: models, checkpoints, images and videos from the command line."""
import argparse
import importlib
import json
import os
import sys
from typing import Any, List, Optional

# the work is imported where it is done: help and usage errors need none of it


def _list(args: argparse.Namespace) -> None:
    from .zoo.registry import describe, list_names, table

    filters = [f if any(c in f for c in '*?[') else f'*{f}*' for f in args.filter]
    rows = [describe(name) for name in list_names(filters, pretrained=not args.all, include_tags=True)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    cells = [
        [r['name'], _number(r['top1']), _number(r['params'] / 1e6), _number(r['gmacs']),
         '×'.join(str(s) for s in r['input_size'][1:]), r['license'] or '', 'yes' if r['cached'] else '']
        for r in rows]
    print(table(cells, ['model', 'top-1', 'M params', 'GMACs', 'input', 'licence', 'cached'], right=(1, 2, 3, 4)))


def _number(x: Optional[float]) -> str:
    return '' if x is None else f'{x:.1f}'


def _convert(args: argparse.Namespace) -> None:
    from .hub.checkpoints import read_lines
    from .hub.convert import convert

    labels = read_lines(args.labels) if args.labels else None
    done = convert(args.source, args.folder, model=args.model, label_names=labels)
    print(f'{done.name} ({done.certainty}), {done.parameters:,} parameters')
    print(f'reloaded from {done.folder}: all parameters there, logits equal to {done.difference:.1g} of the largest')
    print(f"load it with timm.create_model('local-dir:{done.folder}', pretrained=True)")


def _push(args: argparse.Namespace) -> None:
    from .hub import publish

    files = publish.check(args.folder)
    where = f'{"private " if args.private else ""}{args.repo}, branch {args.revision or "main"}'
    if args.dry_run:
        print(f'would upload to {where}:')
        for name, size in files:
            print(f'  {name}  {size:,} bytes')
        return
    print(publish.push(args.folder, args.repo, args.private, args.revision, args.message))


def _classify(args: argparse.Namespace) -> int:
    from .hub import classify

    model = classify.load_model(args.model, args.device)
    sources = classify.find_files(model, args.source)
    results, failures = [], 0
    for source, top in classify.classify(model, sources, args.topk, args.batch_size):
        if isinstance(top, ValueError):
            failures += 1
            print(f'timm-ssm classify: {top}', file=sys.stderr)
        elif args.json:
            results.append({classify.takes(model): source, 'classes': top})
        else:
            print(source)
            for row in top:
                print(f'  {row["probability"]:7.2%}  {row["name"]}')
    if args.json:
        print(json.dumps(results, indent=2))
    return int(failures > 0)


def _check_videos(args: argparse.Namespace) -> int:
    from .data import create_clip_reader
    from .data.check import check_videos, list_names, write_lists

    reader = create_clip_reader(
        args.dataset, args.data, args.split, class_map=args.class_map, video_root=args.video_root,
        frame_name=args.frame_name)
    reasons = check_videos(reader, args.workers)
    good, bad = (given or name for given, name in zip((args.good, args.bad), list_names(args.data)))
    write_lists(reader, reasons, good, bad)
    for row, reason in enumerate(reasons):
        if reason:
            print(f'{reader.name(row)}: {reason}')
    count = sum(map(bool, reasons))
    print(f'{count} of {len(reader)} videos cannot be read; the others are in {good}, these in {bad}')
    return int(count > 0)


def _export(args: argparse.Namespace) -> None:
    from .export import export, model_input_size
    from .hub.classify import load_model

    model, input_size = load_model(args.model), None
    if args.img_size:
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=args.img_size)
        input_size = (*model_input_size(model)[:-2], args.img_size, args.img_size)
    if args.dynamic_size and hasattr(model, 'dynamic_img_size'):
        model.set_input_size(dynamic_img_size=True)
    done = export(
        model, args.file, format=args.format, scan=args.scan, input_size=input_size, batch_size=args.batch_size,
        dynamic_size=args.dynamic_size)
    shapes = ' and '.join('×'.join(map(str, shape)) for shape in done.checked)
    print(f'{done.path}: {done.size / 1e6:.1f} MB, {done.nodes:,} operators')
    print(f'run on inputs of {shapes}: outputs equal to {done.difference:.1g} of the largest')


def _analyse(args: argparse.Namespace) -> None:
    from .analysis import command

    for path in command.run(args):
        print(path)


def _plot(args: argparse.Namespace) -> None:
    from .plot import plot

    path = plot(args.input, args.output, args.columns)
    print(f'{path}: open it in a browser' if path.endswith('.html') else path)


def _app(args: argparse.Namespace) -> None:
    from .app import serve

    serve(args.model, args.host, args.port, args.device)


def _env(args: argparse.Namespace) -> None:
    from . import env

    env.main()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog='timm-ssm', description='Vision state-space models for timm.')
    commands = root.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=f'{text[0].upper()}{text[1:]}.')
        p.set_defaults(run=run)
        return p

    p = command('list', _list, 'list the pretrained tags with published accuracy, size and licence')
    p.epilog = ('top-1 as published for the tag\'s last data set; GMACs of one image or clip, counted alike for all, '
                'the scan included (docs/models.md has the published ones); input as [frames×]height×width')
    p.add_argument('filter', nargs='*', help="part of a name, or a pattern such as 'videomamba_*_448*'")
    p.add_argument('--all', action='store_true', help='also the models without pretrained weights')
    p.add_argument('--json', action='store_true', help='print JSON')

    p = command('convert', _convert, 'convert a checkpoint to a folder that timm loads, and prove it the same')
    p.add_argument('source', help='file, pretrained tag, or owner/name[@revision][/file] on the Hub')
    p.add_argument('folder', help='folder to write: model.safetensors, config.json, README.md')
    p.add_argument('--model', help='architecture; recognised by names and shapes if not given')
    p.add_argument('--labels', metavar='FILE', help='text file with the names of the classes, one a line, in order')

    p = command('push', _push, 'upload a converted folder to the Hub')
    p.add_argument('folder', help='what `timm-ssm convert` wrote')
    p.add_argument('repo', help='owner/name on the Hub; created if it does not exist')
    p.add_argument('--private', action='store_true', help='create a private repository')
    p.add_argument('--revision', help='branch; created if it does not exist (default: main)')
    p.add_argument('--message', help='commit message')
    p.add_argument('--dry-run', action='store_true', help='check the folder and say what would be uploaded')

    p = command('classify', _classify, 'name the likeliest classes of images, or of videos')
    p.add_argument('source', nargs='+', help='files, folders, URLs: of videos if the model takes clips')
    p.add_argument(
        '--model', required=True, help="pretrained tag, 'hf-hub:owner/name', converted folder, or checkpoint of train")
    p.add_argument('--topk', type=_positive, default=5, metavar='N', help='classes to print (default: 5)')
    p.add_argument('--batch-size', type=_positive, default=16, metavar='N', help='inputs at once (default: 16)')
    p.add_argument('--device', default='cpu', help='device (default: cpu)')
    p.add_argument('--json', action='store_true', help='print JSON')

    p = command('check-videos', _check_videos, 'decode all videos of a list or folder, to find the unreadable ones')
    p.add_argument('data', help='list file, or folder of videos by class, or of shards')
    p.add_argument('--dataset', default='', metavar='KIND', help='video-list, ... (default: what is there)')
    p.add_argument('--split', default='train', help='split, where DATA has several (default: train)')
    p.add_argument('--class-map', metavar='FILE', help='text file of class names in order')
    p.add_argument('--video-root', metavar='DIR', help='what paths in a list are relative to')
    p.add_argument('--frame-name', default='img_{:05}.jpg', metavar='PATTERN', help='files in folders of frames')
    p.add_argument('-j', '--workers', type=int, default=os.cpu_count(), metavar='N', help='processes')
    p.add_argument('--good', metavar='FILE', help='list to write of what can be read (default: beside DATA)')
    p.add_argument('--bad', metavar='FILE', help='list to write of what cannot, with reasons (default: beside DATA)')

    p = command('export', _export, 'write a model as ONNX, torch.export or AOTInductor file, and prove it the same')
    p.add_argument('model', help="pretrained tag, 'hf-hub:owner/name', converted folder, or checkpoint of train")
    p.add_argument('file', help='file to write: NAME.onnx or NAME.pt2')
    p.add_argument(
        '--format', choices=('onnx', 'torch', 'aoti'),
        help='torch: a program of torch.export; aoti: compiled for this machine (default: onnx or torch by the suffix)')
    p.add_argument(
        '--scan', choices=('loop', 'op', 'doubling'),
        help="loop: ONNX's Scan (its default); op: this package's kernels (default else); doubling: plain operators")
    p.add_argument('--img-size', type=_positive, metavar='N', help="height and width (default: the model's)")
    p.add_argument('--batch-size', type=_positive, metavar='N', help='of all inputs (default: any)')
    p.add_argument('--dynamic-size', action='store_true', help='leave height and width open too')

    p = command('analyse', _analyse, 'look inside models: a picture, a table and the command that made them')
    analyses = p.add_subparsers(dest='analysis', required=True, metavar='ANALYSIS')

    def analysis(name: str, text: str, source: str, sources: Any = '+', models: Any = '+', **kwargs):
        p = analyses.add_parser(name, help=text, description=f'{text[0].upper()}{text[1:]}.', **kwargs)
        p.add_argument('source', nargs=sources, help=source)
        p.add_argument(
            '--model', nargs=models, required=True, metavar='NAME',
            help="pretrained tag, 'hf-hub:owner/name', converted folder, or checkpoint of train"
                 + ('; several side by side' if models == '+' else ''))
        p.add_argument('--output', metavar='FILE', help=f'picture to write (default: {name}.png)')
        p.add_argument('--device', default='cpu', help='device (default: cpu)')
        return p

    inputs = 'files, folders, URLs: of videos if the model takes clips'
    analysis('attribution', 'rollout and Grad-CAM over inputs, with deletion and insertion curves', inputs)
    p = analysis(
        'attention', 'the hidden attention of tokens of a mixer', 'file or URL: a video if the model takes clips', 1, 1)
    p.add_argument('--mixer', type=int, default=-1, metavar='N', help='number of the mixer, from 0 (default: the last)')
    p.add_argument(
        '--token', type=int, nargs='+', default=[0], metavar='N', help='numbers of tokens, as the mixer gets them')
    analysis('memory', 'how many tokens the states of scans last', inputs)
    analysis('delta', 'the step sizes of scans by layer and token', inputs, models=1)
    p = analysis('field', 'effective receptive fields', 'image files, folders, URLs')
    p.add_argument('--img-size', type=_positive, nargs='+', metavar='N', help="input sizes (default: the model's)")
    analysis('frequency', 'how tokens turn when high frequencies are amplified', inputs)
    p = analysis(
        'order', 'accuracy on videos whose frames are in other orders', 'folder or list of videos, as of validate',
        1, epilog='Other flags are those of validate.')
    p.add_argument(
        '--order', nargs='+', default=['sequential', 'block-4', 'block-2', 'interleaved', 'reversed', 'shuffled'],
        metavar='ORDER', help='as of validate --frame-order (default: %(default)s)')

    # these parse their own flags, see main
    command('train', None, 'train a model, as train.py does')
    command('validate', None, 'measure the accuracy of models, as validate.py does')
    command('plan', None, 'estimate training steps on many GPUs: compute, memory, network, data')

    p = command('plot', _plot, 'draw the curves of runs, and tables of results and benchmarks')
    p.add_argument(
        'input', nargs='+', help='folders of runs, to compare; CSV files of `validate --results-file` or of benchmarks')
    p.add_argument(
        '--output', default='plot.html', metavar='FILE',
        help='page or picture to write: .html, .png, .svg or .pdf (default: plot.html)')
    p.add_argument(
        '--columns', nargs='+', default=(), metavar='NAME',
        help='columns of tables (default: top-1 and top-5 of results, all of others)')

    p = command('app', _app, 'open a page to try models on images and clips in a browser')
    p.add_argument(
        '--model', nargs='+', default=(), metavar='NAME',
        help="to offer first: pretrained tag, 'hf-hub:owner/name', converted folder, or checkpoint of train")
    p.add_argument('--host', help='address to listen on (default: $GRADIO_SERVER_NAME, or 127.0.0.1)')
    p.add_argument('--port', type=int, metavar='N', help='port (default: the first free one from 7860)')
    p.add_argument('--device', default='cpu', help='device (default: cpu)')

    command('env', _env, 'print versions, and which backends run here and why')
    return root


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'got {value}, needs 1 or more')
    return value


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; an error is one message on stderr and exit status 1."""
    argv = sys.argv[1:] if argv is None else argv
    own_flags = dict(train='train', validate='validate', plan='scaling')
    if argv and argv[0] in own_flags:
        module = importlib.import_module(f'.training.{own_flags[argv[0]]}', __package__)
        module.main(argv[1:], prog=f'timm-ssm {argv[0]}')
        return 0
    root = parser()
    args, args.rest = root.parse_known_args(argv)
    if args.rest and getattr(args, 'analysis', None) != 'order':  # which passes them on
        root.error(f'unrecognized arguments: {" ".join(args.rest)}')
    args.argv = argv
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # such as by `| head`; Python would complain when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, RuntimeError, OSError) as e:  # huggingface_hub's are OSErrors
        print(f'timm-ssm {args.command}: {str(e).strip() or type(e).__name__}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
