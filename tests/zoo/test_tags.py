"""Pretrained tags against the authors' lists of released files: none is missing, mistaken for another or made up."""
import itertools
import re

import pytest
import timm
from timm.models import get_pretrained_cfg

from timm_ssm.zoo.registry import list_names

# repositories and files as the authors list them, alternatives in braces
RELEASED = """
OpenGVLab/VideoMamba videomamba_{t16,s16,m16,b16}_in1k_res224.pth
OpenGVLab/VideoMamba videomamba_{t16,s16,m16}_in1k_{res224to448,res224to448to576}.pth
OpenGVLab/VideoMamba videomamba_{t16,s16,m16}_k400_{f8,f16,f32,f64}_res224.pth
OpenGVLab/VideoMamba videomamba_{t16,s16,m16}_k400_f64_res224to384.pth
OpenGVLab/VideoMamba videomamba_m16_k400_mask_ft_{f8,f16,f32,f64}_res224.pth
OpenGVLab/VideoMamba videomamba_m16_k400_mask_ft_f64_res224to384.pth
OpenGVLab/VideoMamba videomamba_{t16,s16,m16}_ssv2_{f8_res224,f16_res224,f16_res224to288}.pth
OpenGVLab/VideoMamba videomamba_m16_ssv2_mask_ft_{f8_res224,f16_res224,f16_res224to288}.pth
OpenGVLab/VideoMamba videomamba_{t16,s16,m16}_breakfast_{f32,f64}_res224.pth
OpenGVLab/VideoMamba videomamba_m16_breakfast_mask_ft_{f32,f64}_res224.pth
hustvl/Vim-tiny-midclstok {vim_t_midclstok_76p1acc,vim_t_midclstok_ft_78p3acc}.pth
hustvl/Vim-small-midclstok {vim_s_midclstok_80p5acc,vim_s_midclstok_ft_81p6acc}.pth
hustvl/Vim-base-midclstok vim_b_midclstok_81p9acc.pth
Abdelrahman-shaker/GroupMamba-Tiny groupmamba_tiny_ema.pth
Abdelrahman-shaker/GroupMamba-Small groupmamba_small_ema.pth
Abdelrahman-shaker/GroupMamba-Base groupmamba_base_ema.pth
nvidia/MambaVision-T-1K mambavision_tiny_1k.pth.tar
nvidia/MambaVision-T2-1K mambavision_tiny2_1k.pth.tar
nvidia/MambaVision-S-1K mambavision_small_1k.pth.tar
nvidia/MambaVision-B-1K mambavision_base_1k.pth.tar
nvidia/MambaVision-L-1K mambavision_large_1k.pth.tar
nvidia/MambaVision-L2-1K mambavision_large2_1k.pth.tar
nvidia/MambaVision-B-21K mambavision_base_21k.pth.tar
nvidia/MambaVision-L-21K mambavision_large_21k.pth.tar
nvidia/MambaVision-L2-512-21K mambavision_L2_21k_240m_512.pth.tar
nvidia/MambaVision-L3-256-21K mambavision_L3_21k_740m_256.pth.tar
nvidia/MambaVision-L3-512-21K mambavision_L3_21k_740m_512.pth.tar
"""
# those of files elsewhere are tested with their family
TAGS = [name for name in list_names(pretrained=True) if get_pretrained_cfg(name).hf_hub_id]


def expand(pattern: str):
    """A shell's brace expansion."""
    parts = [part.split(',') for part in re.split('[{}]', pattern)]
    return map(''.join, itertools.product(*parts))


def test_every_released_file_has_one_tag():
    cfgs = [get_pretrained_cfg(name) for name in TAGS]
    files = [(c.hf_hub_id, c.hf_hub_filename) for c in cfgs]
    assert len(set(files)) == len(files)
    assert set(files) == {tuple(f.split()) for line in RELEASED.split('\n') if line for f in expand(line)}


@pytest.mark.parametrize('name', TAGS)
def test_a_tag_is_of_the_file_that_it_says(name):
    """Size, frames, resolution and dataset in the names of the model and of the authors' file agree."""
    cfg, (model, _, tag) = get_pretrained_cfg(name), name.partition('.')
    file, size = cfg.hf_hub_filename, model.split('_')[1]
    short = dict(tiny2='t2', large2='l2', large3='l3').get(size, size[0])
    if model.startswith('mambavision'):
        assert cfg.hf_hub_id.lower().startswith(f'nvidia/mambavision-{short}-')
        assert f'_{size}_' in file or f'_{short.upper()}_' in file
        assert ('_21k' in file) == ('21k' in cfg.hf_hub_id.lower()) == ('in21k_ft' in tag)
    elif model.startswith('videomamba'):
        dataset = tag.removesuffix('_mask_ft')
        assert file.startswith(f'videomamba_{short}16_{tag}_') and dataset in ('in1k', 'k400', 'ssv2', 'breakfast')
    else:
        assert cfg.hf_hub_id.lower().endswith((f'-{size}', f'-{size}-midclstok'))
        assert f'_{size}_' in file or f'_{short}_' in file
        assert ('_ft_' in file) == ('stride8' in model)
    assert re.findall(r'_f(\d+)_', file) == re.findall(r'_f(\d+)_', model)
    resolution = re.search(r'(?:res(?:\d+to)*|_)(\d{3})\.pth', file)
    assert cfg.input_size == (3, *[int(resolution[1]) if resolution else 224] * 2)
    assert timm.create_model(name, device='meta').num_classes == cfg.num_classes


def test_licences():
    """VideoMamba's and Vim's are free, MambaVision's and GroupMamba's say or note that they are non-commercial."""
    for name in TAGS:
        cfg = get_pretrained_cfg(name)
        free = name.startswith(('videomamba_', 'vim_'))
        assert (cfg.license == 'apache-2.0') == free
        assert ('non-commercial' in ' '.join(cfg.notes or ())) != free
