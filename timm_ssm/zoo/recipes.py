"""How the papers trained: the one table behind the recipes of `train.py --recipe` and docs/recipes.md.

    python -m timm_ssm.zoo.recipes

writes timm_ssm/recipes/*.yaml and the document, in a checkout of the repository.
"""
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from .datasets import DATASETS
from .published import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / 'timm_ssm' / 'recipes'
DOCUMENT = ROOT / 'docs' / 'recipes.md'

Flags = Dict[str, Any]


class Recipe(NamedTuple):
    """One training of a paper: the flags of train.py, and what to say of it."""
    name: str
    source: str  # paper and table
    flags: Flags
    top1: Optional[float]  # published, per cent
    chosen: List[str] = []  # what the text leaves open, and what is taken
    views: str = ''  # clips × crops of the published accuracy


VIDEOMAMBA = 'VideoMamba (Li et al., ECCV 2024, https://arxiv.org/abs/2403.06977)'
STABLEMAMBA = 'StableMamba (Suleman et al., 2024, https://arxiv.org/abs/2409.11867)'
VIDEOMAMBAPRO = 'VideoMambaPro (Lu et al., CVPR 2025, https://arxiv.org/abs/2406.19006)'
STVIDEOMAMBA = 'ST-VideoMamba (Park et al., ECCV 2024, https://arxiv.org/abs/2407.08476)'
GROUPMAMBA = 'GroupMamba (Shaker et al., CVPR 2025, https://arxiv.org/abs/2407.13772)'
MAMBAVISION = 'MambaVision (Hatamizadeh and Kautz, CVPR 2025, https://arxiv.org/abs/2407.08083)'
VIM = 'Vim (Zhu et al., ICML 2024, https://arxiv.org/abs/2401.09417)'
VMAMBA = 'VMamba (Liu et al., NeurIPS 2024, https://arxiv.org/abs/2401.10166)'
SPATIALMAMBA = 'Spatial-Mamba (Xiao et al., ICLR 2025, https://arxiv.org/abs/2410.15091)'
IMAGE_TABLE = 'hyperparameters of ImageNet-1k training'
SCRIPTS = "the released code's scripts (github.com/hustvl/Vim at dd0358a), which its text follows"
VMAMBA_CODE = 'the released configurations (github.com/MzeroMiko/VMamba at 2ed52ea)'
GROUPMAMBA_CODE = (
    'The values are those of the text; the released code (github.com/Amshaker/GroupMamba at c1800ed) has a stochastic '
    "depth of 0.05 and Swin's schedule: all rates follow the batch, and the cosine, set every step, begins after the "
    'warm-up.')
SPATIALMAMBA_CODE = 'the released configurations (github.com/EdwardChasel/Spatial-Mamba at 71221eb)'
CLIP_TABLE = "the released code's scripts, which its tables of hyperparameters follow"

# of DeiT's recipe, which the papers on images build on
IMAGES = dict(
    train_interpolation='bicubic', reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, opt='adamw', opt_eps=1e-8,
    warmup_lr=1e-6)
DEIT = 'Left open: interpolation, the warm-up\'s first learning rate (DeiT\'s bicubic and 1e-6).'
RAND_AUGMENT = 'rand-m9-mstd0.5-inc1'
BF16 = dict(amp=True, amp_dtype='bfloat16')
A_LOG = 'The released code decays A_log, which Mamba exempts: without decay_a_log it is exempt.'


def rate(lr: float, batch: int, **kwargs) -> Flags:
    """A learning rate at a batch, to follow the batch linearly."""
    return dict(lr_base=lr, lr_base_size=batch, lr_base_scale='linear', **kwargs)


def image_recipes() -> Iterator[Recipe]:
    common = dict(IMAGES, batch_size=128, clip_grad=5.0, **BF16)
    aligned = dict(kd_model_name='videomamba_small_patch16_224.in1k', kd_distill_type='alignment')
    for size, flags in dict(
            tiny=dict(aa='v0', aug_repeats=0, weight_decay=0.1, drop_path=0.0),
            small=dict(aa=RAND_AUGMENT, aug_repeats=3, weight_decay=0.05, drop_path=0.15),
            middle=dict(aa=RAND_AUGMENT, aug_repeats=3, weight_decay=0.05, drop_path=0.5, **aligned),
            base=dict(aa=RAND_AUGMENT, aug_repeats=3, weight_decay=0.05, drop_path=0.5, **aligned),
    ).items():
        large = size in ('middle', 'base')
        chosen = [DEIT, A_LOG]
        if large:
            chosen.append('Left open: the weight of the alignment loss (1).')
        model = f'videomamba_{size}_patch16'
        yield Recipe(
            f'videomamba_{size}_in1k', f'{VIDEOMAMBA}, {IMAGE_TABLE}',
            dict(model=f'{model}_224', epochs=300, **rate(5e-4, 512), min_lr=5e-6 if large else 1e-5,
                 warmup_epochs=20 if large else 5, **common, **flags, decay_a_log=True),
            PUBLISHED[f'{model}_224.in1k'].top1, chosen)
        if size == 'base':
            continue
        flags = {k: v for k, v in flags.items() if not k.startswith('kd_')}
        for resolution, before, epochs, warmup in ((448, 224, 30, 5), (576, 448, 10, 2)):
            yield Recipe(
                f'videomamba_{size}_in1k_{resolution}ft', f'{VIDEOMAMBA}, {IMAGE_TABLE}, fine-tuning',
                dict(model=f'{model}_{resolution}', initial_checkpoint=f'{model}_{before}.in1k', epochs=epochs,
                     **rate(5e-6, 512), min_lr=5e-6, warmup_epochs=warmup, **common,
                     **dict(flags, weight_decay=1e-8), decay_a_log=True),
                PUBLISHED[f'{model}_{resolution}.in1k'].top1, [DEIT, A_LOG])

    for size, flags in dict(
            tiny=dict(aa='rand-m7-mstd0.25', aug_repeats=3, weight_decay=0.1, drop_path=0.0, min_lr=1e-5),
            small=dict(aa='rand-m9-mstd0.5', aug_repeats=0, weight_decay=0.05, drop_path=0.15, min_lr=1e-5),
            middle=dict(aa='rand-m9-mstd0.5', aug_repeats=0, weight_decay=0.05, drop_path=0.5, min_lr=1e-5),
            base=dict(aa='rand-m9-mstd0.5', aug_repeats=0, weight_decay=0.05, drop_path=0.5, min_lr=5e-6),
            large=dict(aa='rand-m9-mstd0.5', aug_repeats=0, weight_decay=0.05, drop_path=0.5, min_lr=5e-6),
    ).items():
        model = f'stablemamba_{size}_patch16_224'
        yield Recipe(
            f'stablemamba_{size}_in1k', f'{STABLEMAMBA}, {IMAGE_TABLE}',
            dict(model=model, epochs=300, **rate(5e-4, 2048), batch_size=128,
                 warmup_epochs=dict(tiny=5, small=5, middle=30).get(size, 20), **IMAGES, **flags),
            PUBLISHED[f'{model}.untrained'].top1,
            [DEIT, 'The text gives 5e-4 beside 16 GPUs of 128 images, not whether it is scaled (taken as it is).',
             'Without mixed precision, as the text says.'])

    for size, weight_decay, drop_path, warmup in (
            ('tiny', 0.1, 0.0, 5), ('small', 0.05, 0.15, 10), ('middle', 0.05, 0.5, 40)):
        model = f'videomambapro_{size}_patch16_224'
        yield Recipe(
            f'videomambapro_{size}_in1k', f'{VIDEOMAMBAPRO}, {IMAGE_TABLE}',
            dict(model=model, epochs=300, **rate(1.5e-4, 512), min_lr=1e-6, warmup_epochs=warmup, batch_size=128,
                 opt_betas=[0.9, 0.95], weight_decay=weight_decay, drop_path=drop_path, aa=RAND_AUGMENT,
                 clip_grad=5.0, **IMAGES, **BF16, decay_a_log=True),
            PUBLISHED[f'{model}.untrained'].top1,
            [DEIT, A_LOG, "Left open: epochs, RandAugment, gradient clipping, precision (VideoMamba's).",
             'The text says dropout where VideoMamba has stochastic depth (taken as that), and multi-scale crops, '
             'which timm does not have (random resized crops).'])

    for size in ('tiny', 'small', 'base'):
        yield Recipe(
            f'groupmamba_{size}_in1k', f'{GROUPMAMBA}, {IMAGE_TABLE}',
            dict(model=f'groupmamba_{size}', epochs=300, **rate(5e-4, 512), min_lr=5e-6, warmup_epochs=20,
                 batch_size=128, weight_decay=0.05, drop_path=0.1, aa=RAND_AUGMENT, clip_grad=5.0, amp=True, **IMAGES,
                 model_ema=True, model_ema_decay=0.9999, kd_model_name='regnety_160.deit_in1k',
                 kd_distill_type='token', kd_token_distill_type='hard', task_loss_weight=0.5),
            PUBLISHED[f'groupmamba_{size}.in1k'].top1,
            [DEIT, "The teacher is DeiT's RegNetY-16GF; half the loss is the labels', half the teacher's, as in DeiT.",
             GROUPMAMBA_CODE])

    for size, weight, code in (
            ('tiny', 0.5, ''), ('tiny2', 0.75, ''), ('small', 1.0, ''),
            ('base', 1.0, 'a weight decay of 0.075, a warm-up of 35 epochs, '),
            ('large', 6.0, 'a weight decay of 0.12, '), ('large2', 6.0, 'a weight decay of 0.12, ')):
        stated = size in ('tiny', 'base', 'large')
        start = 94 if size == 'base' else 78
        yield Recipe(
            f'mambavision_{size}_in1k', f'{MAMBAVISION}, {IMAGE_TABLE}',
            dict(model=f'mambavision_{size}', epochs=300, cooldown_epochs=10, **rate(5e-3, 4096), min_lr=5e-6,
                 warmup_epochs=20, batch_size=128, weight_decay=0.05,
                 drop_path=0.3 if size.startswith(('base', 'large')) else 0.2, aa=RAND_AUGMENT, clip_grad=5.0, amp=True,
                 channels_last=True, **dict(IMAGES, opt='lamb'), model_ema=True, model_ema_decay=0.9998),
            PUBLISHED[f'mambavision_{size}.in1k'].top1,
            [DEIT, *([] if stated else ['Left open: stochastic depth of this size (that of its neighbours).']),
             'The values are those of the text; the released configuration (github.com/NVlabs/MambaVision at 7860a50) '
             f'has random interpolation, 310 epochs before the cool-down, {code}and adds, from epoch {start} on, '
             f'{weight} times a distance to the outputs of the averaged model (MESA), which is not part of this '
             'package.'])

    yield from vim_recipes()
    yield from swin_recipes()


def vim_recipes() -> Iterator[Recipe]:
    common = dict(
        IMAGES, aa=RAND_AUGMENT, aug_repeats=3, min_lr=1e-5, warmup_epochs=5, model_ema=True, model_ema_decay=0.99996,
        decay_a_log=True)
    for size, lr, batch_size, weight_decay, drop_path in (
            ('tiny', 5e-4, 128, 0.1, 0.0), ('small', 1e-3, 64, 0.05, 0.05), ('base', 5e-4, 128, 0.05, 0.1)):
        model = f'vim_{size}_patch16_224'
        chosen = [A_LOG, 'Without mixed precision, as the scripts say.']
        if size == 'tiny':
            chosen.append('The text says a weight decay of 0.05.')
        elif size == 'small':
            chosen.append('The text says 1e-3 at 1024 images; the script takes that at 512.')
        else:
            chosen.append("No script: left open is stochastic depth (DeiT's); the rest is the text's.")
        yield Recipe(
            f'vim_{size}_in1k', f'{VIM}, {SCRIPTS}',
            dict(model=model, epochs=300, **rate(lr, 512), batch_size=batch_size, weight_decay=weight_decay,
                 drop_path=drop_path, **common),
            PUBLISHED[f'{model}.in1k'].top1, chosen)
        if size != 'base':
            yield Recipe(
                f'vim_{size}_in1k_stride8ft', f'{VIM}, {SCRIPTS}, fine-tuning with overlapping patches',
                dict(model=f'vim_{size}_patch16_stride8_224', initial_checkpoint=f'{model}.in1k', epochs=30,
                     **rate(5e-6, 512), batch_size=128, weight_decay=1e-8, drop_path=0.0,
                     **dict(common, warmup_lr=1e-5)),
                PUBLISHED[f'vim_{size}_patch16_stride8_224.in1k'].top1,
                [A_LOG, 'Without mixed precision, as the script says. At its batch of 1024 the learning rate is '
                        'constant.'])


def swin_recipes() -> Iterator[Recipe]:
    """Those on Swin's recipe: all rates follow the batch, and the cosine, set every step, begins after the warm-up."""
    common = dict(
        IMAGES, aa=RAND_AUGMENT, epochs=280, warmup_epochs=20, warmup_prefix=True, sched_on_updates=True,
        **rate(1e-3, 1024), min_lr=1e-5, lr_base_all=True, batch_size=128,
        weight_decay=0.05, clip_grad=5.0, amp=True, model_ema=True, model_ema_decay=0.9999, decay_a_log=True)
    dt_bias = 'The released code decays A_log, here by decay_a_log, and the biases of dt too, which are exempt here.'
    for size, drop_path in dict(
            tiny=0.2, small=0.3, base=0.6, tiny_s2l5=0.2, small_s1l20=0.3, base_s1l20=0.5).items():
        yield Recipe(
            f'vmamba_{size}_in1k', f'{VMAMBA}, {VMAMBA_CODE}',
            dict(model=f'vmamba_{size}', drop_path=drop_path, **common),
            PUBLISHED[f'vmamba_{size}.in1k'].top1, [dt_bias])
    for size, drop_path, weight in (('tiny', 0.2, 1.0), ('small', 0.3, 1.5), ('base', 0.5, 2.0)):
        yield Recipe(
            f'spatialmamba_{size}_in1k', f'{SPATIALMAMBA}, {SPATIALMAMBA_CODE}',
            dict(model=f'spatialmamba_{size}', drop_path=drop_path, **common),
            PUBLISHED[f'spatialmamba_{size}.untrained'].top1,
            [dt_bias, f'The published training adds, from epoch 75 on, {weight} times the cross-entropy to the outputs '
                      'of the averaged model (MESA), which is not part of this package.'])


AUGMENT_CLIPS = dict(tiny='rand-m5-n2-mstd0.25-inc1', other='rand-m7-n4-mstd0.5-inc1')
DROP_PATH = dict(tiny=0.1, small=0.35, middle=0.8, mask=0.4)
TEST_VIEWS = 'Test with validate.py --test-num-segment {} --test-num-crop {}.'


def clip_flags(dataset: str, weight_decay: float, aa: str, drop_path: float, sampling: str = 'sparse') -> Flags:
    """What the trainings on clips share: those of VideoMamba's code, which the others build on."""
    classes = {'coin': 180, 'ucf101': 101, **{key: known.num_classes for key, known in DATASETS.items()}}
    return dict(
        **(dict(num_classes=classes[dataset]) if dataset in classes else {}), clip_sampling=sampling, num_sample=2,
        aa=aa, train_interpolation='bilinear', reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, opt='adamw',
        opt_eps=1e-8, weight_decay=weight_decay, drop_path=drop_path, sched='cosine_per_step', **BF16,
        **(dict(no_hflip=True) if dataset == 'ssv2' else {}))


def steps(samples: int, peak: float, **kwargs) -> Flags:
    """Learning rates by the samples of a step, in 8 processes that augment each video twice."""
    lr = rate(peak * 256 / samples, 256, min_lr=1e-6, warmup_lr=1e-6, lr_base_all=True)
    return dict(lr, batch_size=samples // 16, **kwargs)


# samples per step and peak learning rate of tiny, small, middle, and middle after masked pretraining
K400 = {
    8: [(1024, 8e-4), (1024, 8e-4), (1024, 8e-4), (1024, 4e-4)],
    16: [(1024, 8e-4), (1024, 8e-4), (512, 2e-4), (512, 2e-4)],
    32: [(512, 4e-4), (512, 4e-4), (256, 1e-4), (256, 1e-4)],
    64: [(512, 4e-4), (256, 2e-4), (128, 5e-5), (128, 5e-5)],
}
K400_384 = [(192, 3.75e-6), (256, 5e-6), (64, 1.25e-6), (64, 1.25e-6)]
SSV2 = {
    8: [(1024, 1.6e-3), (1024, 1.6e-3), (1024, 1.6e-3), (1024, 4e-4)],
    16: [(1024, 1.6e-3), (1024, 1.6e-3), (512, 8e-4), (512, 2e-4)],
}
SSV2_288 = [(1024, 2e-5), (384, 7.5e-6), (192, 3.75e-6), (192, 3.75e-6)]
LONG = {
    32: [(512, 4e-4), (512, 4e-4), (128, 1e-4), (128, 1e-4)],
    64: [(512, 4e-4), (256, 2e-4), (64, 5e-5), (64, 5e-5)],
}
COIN_TOP1 = {32: [86.2, 88.4, 88.3, 89.6], 64: [87.0, 88.7, 89.5, 90.4]}
KINDS = ('tiny', 'small', 'middle', 'mask')


def videomamba_clips() -> Iterator[Recipe]:
    def make(kind: str, dataset: str, name: str, frames: int, size: int, batch: tuple, epochs: int, warmup: int = 5,
             start: Optional[str] = None, top1: Optional[float] = None, views: str = '4 × 3', **kwargs) -> Recipe:
        width = 'middle' if kind == 'mask' else kind
        drop_path = kwargs.pop('drop_path', DROP_PATH[kind])
        decay = kwargs.pop('layer_decay', 0.8 if kind == 'mask' else 0.75)
        weight_decay = kwargs.pop('weight_decay', 0.1 if kind == 'tiny' else 0.05)
        sampling = 'ssv2' if dataset == 'ssv2' else 'sparse'
        model = f'videomamba_{width}_patch16_f{frames}_{size}'
        tag = dataset + ('_mask_ft' if kind == 'mask' else '')
        chosen = [A_LOG, 'layer_decay_mode: none and proper are the alternatives; released slows the embeddings alone.']
        if sampling == 'ssv2':
            chosen.append('For folders of frames instead of videos, give --clip-sampling ssv2_frames.')
        if start is None:
            chosen.append('After masked pretraining, which is not part of this package.')
        return Recipe(
            f'videomamba_{width}_{name}' + ('_mask' if kind == 'mask' else ''), f'{VIDEOMAMBA}, {CLIP_TABLE}',
            dict(model=start if kwargs.get('pretrained') else model,
                 **({} if kwargs.get('pretrained') or not start else dict(initial_checkpoint=start)),
                 **clip_flags(
                     dataset, weight_decay, AUGMENT_CLIPS['tiny' if kind == 'tiny' else 'other'], drop_path, sampling),
                 **steps(*batch, epochs=epochs, warmup_epochs=warmup),
                 layer_decay=decay, layer_decay_mode='released', decay_a_log=True, **kwargs),
            top1 if top1 or dataset == 'lvu' else PUBLISHED[f'{model}.{tag}'].top1, chosen, views)

    for i, kind in enumerate(KINDS):
        width = 'middle' if kind == 'mask' else kind
        masked = '_mask_ft' if kind == 'mask' else ''
        model = f'videomamba_{width}_patch16'
        image = None if masked else f'{model}_224.in1k'
        epochs = dict(tiny=70, small=50, middle=50, mask=45)[kind]
        for frames, batches in K400.items():
            yield make(kind, 'k400', f'k400_f{frames}', frames, 224, batches[i], epochs, start=image)
        yield make(
            kind, 'k400', 'k400_f64_384', 64, 384, K400_384[i], 10 if kind == 'tiny' else 6, 2 if kind == 'tiny' else 1,
            f'{model}_f64_224.k400{masked}', weight_decay=1e-8)
        epochs = 35 if kind == 'tiny' else 30
        for frames, batches in SSV2.items():
            yield make(kind, 'ssv2', f'ssv2_f{frames}', frames, 224, batches[i], epochs, start=image, views='2 × 3')
        yield make(
            kind, 'ssv2', 'ssv2_f16_288', 16, 288, SSV2_288[i], 10, 2, f'{model}_f16_224.ssv2{masked}', views='2 × 3',
            weight_decay=1e-8)
        for dataset, epochs in dict(breakfast=(70, 50, 50, 45), coin=(40, 35, 30, 30)).items():
            for frames, batches in LONG.items():
                top1 = COIN_TOP1[frames][i] if dataset == 'coin' else None
                yield make(
                    kind, dataset, f'{dataset}_f{frames}', frames, 224, batches[i], epochs[i],
                    start=f'{model}_f{frames}_224.k400{masked}', top1=top1, pretrained=True,
                    views='10 × 3' if dataset == 'coin' else '4 × 3', layer_decay=0.8 if i > 1 else 0.75,
                    drop_path=0.4 if kind == 'small' else DROP_PATH[kind])
    lvu = make(
        'tiny', 'lvu', 'lvu_f32', 32, 224, (128, 2e-4), 70, start='videomamba_tiny_patch16_f32_224.k400',
        pretrained=True, drop_path=0.15, views='4 × 3')
    yield lvu._replace(chosen=[
        *lvu.chosen, 'Of the tasks with classes; give --num-classes: relation 4, speak 5, scene 6, director 10, '
        'genre 4, writer 10, year 9.'])


def other_clips() -> Iterator[Recipe]:
    open_batch = 'The text gives a batch "due to GPU memory" and not how many GPUs; the rate is taken at 256 samples.'
    base = "Left open: precision, layer decay, random erasing, mixup and schedule (VideoMamba's, without layer decay)."
    for size in ('tiny', 'small', 'middle', 'base'):
        tiny, key = size == 'tiny', 'middle' if size == 'base' else size
        for dataset in ('k400', 'ssv2'):
            if dataset == 'ssv2' and size == 'base':
                continue
            model = f'stablemamba_{size}_patch16_f16_224'
            published = PUBLISHED[f'{model}.untrained']
            yield Recipe(
                f'stablemamba_{size}_{dataset}_f16', f'{STABLEMAMBA}, hyperparameters of {DATASETS[dataset].name}',
                dict(model=model, **clip_flags(
                        dataset, 0.1 if tiny else 0.05, 'rand-m7-mstd0.25-inc1' if tiny else 'rand-m9-mstd0.5-inc1',
                        DROP_PATH[key], 'ssv2' if dataset == 'ssv2' else 'sparse'),
                     **rate(2e-4 if dataset == 'k400' and size in ('middle', 'base') else 4e-4, 256),
                     min_lr=1e-6, warmup_lr=1e-6, lr_base_all=True, batch_size=32 if tiny else 16,
                     epochs=(35 if tiny else 30) if dataset == 'ssv2' else (70 if tiny else 50), warmup_epochs=5),
                published.top1 if dataset == 'k400' else float(published.note.split()[0]), [open_batch, base],
                '4 × 3' if dataset == 'k400' or size == 'middle' else '2 × 3')
    for i, size in enumerate(('tiny', 'small', 'middle')):
        notes = PUBLISHED[f'videomambapro_{size}_patch16_f16_224.untrained']
        top1 = dict(k400=notes.top1, ssv2=float(notes.note.split()[0]))
        if size == 'middle':
            top1.update(ucf101=91.6, hmdb51=63.2)
        for dataset, lr, beta in (
                ('k400', 1.5e-4, 0.99), ('ssv2', 4e-4, 0.999), ('ucf101', 4e-4, 0.99), ('hmdb51', 4e-4, 0.99)):
            for frames in (16, 32) if dataset == 'k400' else (16,):
                batch = 128 if dataset in ('ucf101', 'hmdb51') else 256
                yield Recipe(
                    f'videomambapro_{size}_{dataset}_f{frames}', f'{VIDEOMAMBAPRO}, hyperparameters of clips',
                    dict(model=f'videomambapro_{size}_patch16_f{frames}_224', **clip_flags(
                            dataset, 0.1 if size == 'tiny' else 0.05,
                            'rand-m7-mstd0.25-inc1' if size == 'tiny' else 'rand-m9-mstd0.5-inc1',
                            (0.1, 0.35, 0.6)[i], 'ssv2' if dataset == 'ssv2' else 'sparse'),
                         **rate(lr, batch), min_lr=1e-6, warmup_lr=1e-6, lr_base_all=True, batch_size=batch // 16,
                         opt_betas=[0.9, beta], epochs=(70, 50, 50)[i], warmup_epochs=(5, 5, 10)[i],
                         layer_decay=0.75, layer_decay_mode='released', decay_a_log=True),
                    top1.get(dataset) if frames == 16 else None,
                    [A_LOG, "Left open: epochs, precision, erasing, schedule (VideoMamba's, whose code it is).",
                     f'The tables say a batch of {batch}, the text 512.'],
                    '4 × 3' if dataset == 'k400' or (dataset, size) == ('ssv2', 'middle') else
                    '2 × 3' if dataset == 'ssv2' else '')
    for dataset, epochs, top1, views in (
            ('k400', 30, 76.1, '5 × 3'), ('ssv2', 35, 63.7, '2 × 3'), ('hmdb51', 50, 68.6, '')):
        yield Recipe(
            f'stvideomamba_small_{dataset}_f16', f'{STVIDEOMAMBA}, training settings of {DATASETS[dataset].name}',
            dict(model='stvideomamba_small_patch16_f16_224',
                 **dict(clip_flags(
                     dataset, 0.05, 'rand-m9-mstd0.5-inc1', 0.35,
                     'ssv2' if dataset == 'ssv2' else 'dense_videomae'), num_sample=1),
                 sampling_rate=2, **rate(3e-4, 64), min_lr=1e-6, warmup_lr=1e-6, batch_size=8, epochs=epochs,
                 warmup_epochs=1),
            top1, ["Left open: weight decay, stochastic depth, RandAugment, mixup, lowest rate (VideoMamba-S's).",
                   "The text says a temporal stride of 2; the views are taken as VideoMAE's (SSv2: segments)."], views)


def recipes() -> List[Recipe]:
    """All of them, images first."""
    return [*image_recipes(), *videomamba_clips(), *other_clips()]


def text(recipe: Recipe) -> str:
    """The recipe as a YAML file."""
    lines = [f'# {recipe.source}.']
    if recipe.top1:
        lines.append(f'# Published top-1: {recipe.top1} %' + (f', of {recipe.views} views.' if recipe.views else '.'))
    if recipe.views:
        lines.append('# ' + TEST_VIEWS.format(*recipe.views.split(' × ')))
    lines += [f'# {line}' for line in recipe.chosen]
    if 'num_sample' in recipe.flags and not {'initial_checkpoint', 'pretrained'} & recipe.flags.keys():
        lines.append('# Starts from weights that are not public: give yours as --initial-checkpoint FILE.')
    size = recipe.flags['lr_base_size']
    lines.append(f'# The learning rate is stated for {size} samples in a step, and follows the batch.')
    return '\n'.join(lines) + '\n' + ''.join(f'{k}: {yaml_value(v)}\n' for k, v in recipe.flags.items())


def yaml_value(value: Any) -> str:
    """A value as YAML 1.1 reads it, where a float has a point before its exponent."""
    if isinstance(value, float):
        mantissa, e, exponent = f'{value:g}'.partition('e')
        return mantissa + ('' if '.' in mantissa else '.0') + e + exponent
    return json.dumps(value) if isinstance(value, (bool, list)) or value == '' else str(value)


def all_epochs(recipe: Recipe) -> int:
    """Those of the schedule and, where it does not have them, of the warm-up."""
    flags = recipe.flags
    return flags['epochs'] + (flags['warmup_epochs'] if flags.get('warmup_prefix') else 0)


def data(recipe: Recipe) -> str:
    """The data set, as the recipe's name has it."""
    return 'IMAGENET' if '_in1k' in recipe.name else recipe.name.split('_')[2].upper()


def document() -> str:
    """docs/recipes.md."""
    rows = ''.join(
        f'| `{r.name}` | {r.top1 or "–"} | {r.views or ("–" if "num_sample" in r.flags else "")} | '
        f'{r.flags["lr_base"]:g} @ {r.flags["lr_base_size"]} | {all_epochs(r)} '
        f'| `train.py {data(r)} --recipe {r.name}` |\n' for r in recipes())
    return INTRODUCTION + rows


INTRODUCTION = '''# Recipes

Written by `python -m timm_ssm.zoo.recipes`; do not edit.

A recipe is a YAML file with the flags of one training of a paper; the package brings them along, in
`timm_ssm/recipes`. Comments in each name its source, and what that leaves open and was chosen.

```sh
torchrun --nproc-per-node 8 train.py IMAGENET --recipe videomamba_tiny_in1k
torchrun --nproc-per-node 8 train.py K400 --recipe videomamba_tiny_k400_f8 --batch-size 32    # flags given win
python train.py --recipe videomamba_small_in1k --train-num-samples 1281167 --dry-run 8        # the plan, no data needed
```

The learning rate follows the batch as in the papers: it is stated at a number of samples in an optimiser step, over all
processes, and scaled linearly from there. `--dry-run N` prints what the recipe comes to in N processes: data, model,
parameter groups, learning rates, steps, and an estimate of the memory, and stops. Accuracies are those published, none
is measured here; no source states GPU-days. Epochs are those with the warm-up. Views are clips × crops.

Three flags are not timm's, and say what VideoMamba's released code does:

- `--layer-decay RATE --layer-decay-mode released`: that code looks for its blocks under a wrong name, so that of the
  layers only the embeddings are slowed, by RATE to the depth + 1. `proper` is timm's layer decay, `none` is without.
- `--decay-a-log` decays A_log, which Mamba exempts from weight decay (and so does every model here by itself).
- `--sched cosine_per_step` and `--lr-base-all`: clips are trained with a learning rate set every step, whose warm-up
  includes both ends, and with `--min-lr` and `--warmup-lr` that follow the batch, too, as do VMamba's and
  Spatial-Mamba's.

timm's own train.py takes the files as well, `python -m timm_ssm TIMM/train.py DATA --config FILE`, where these and the
flags of clips are not needed: the recipes of StableMamba, GroupMamba and MambaVision for ImageNet. It ignores keys that
it does not know.

| recipe | top-1 | views | learning rate @ batch | epochs | command, after `torchrun --nproc-per-node 8` |
| --- | ---: | :---: | ---: | ---: | --- |
'''


def main() -> None:
    for path in RECIPES.glob('*.yaml'):
        path.unlink()
    for recipe in recipes():
        (RECIPES / f'{recipe.name}.yaml').write_text(text(recipe), encoding='utf-8')
    DOCUMENT.write_text(document(), encoding='utf-8')


if __name__ == '__main__':
    main()
