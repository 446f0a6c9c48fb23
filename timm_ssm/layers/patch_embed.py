"""Patch embedding for images and clips."""
from typing import Optional, Tuple, Union

import torch
from timm.layers import resample_patch_embed, to_2tuple
from torch import _assert, nn

Size2 = Union[int, Tuple[int, int]]


def resample_patch_kernel(kernel: torch.Tensor, patch_size: Tuple[int, int]) -> torch.Tensor:
    """A patch embedding's kernel (..., h, w), of images or clips, for another patch size (FlexiViT's resampling)."""
    frames = kernel.flatten(1, -3)  # a clip's kernel holds one image kernel a frame
    return resample_patch_embed(frames, list(patch_size)).reshape(*kernel.shape[:-2], *patch_size)


def _check_size(name: str, size: Size2, patch_size: Tuple[int, int] = (1, 1)) -> None:
    """Refuse a size below that of a patch."""
    if any(n < least for n, least in zip(to_2tuple(size), patch_size)):
        needs = '1' if patch_size == (1, 1) else f'the patch size {patch_size[0]} x {patch_size[1]}'
        raise ValueError(f'{name}: got {size}, needs at least {needs}')


def _got(name: str, size: int) -> str:
    """The beginning of an error message; torch.compile would compile a program for each size in a message."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return f'x: got another {name}'
    return f'x: got {name} {size}'


class PatchEmbed(nn.Module):
    """Images or clips to a grid of tokens by one convolution.

    Unlike timm's, it takes clips (a Conv3d over tubelets) and overlapping patches (a stride below the patch size).
    """

    def __init__(
            self,
            img_size: Size2 = 224,
            patch_size: Size2 = 16,
            stride: Optional[Size2] = None,
            num_frames: int = 1,
            tubelet_size: int = 1,
            in_chans: int = 3,
            embed_dim: int = 768,
            strict_img_size: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels.
            patch_size: Patch height and width in pixels.
            stride: Distance between patches in pixels; the patch size if None.
            num_frames: Frames of a clip; 1 for images.
            tubelet_size: Frames in one token of a clip.
            in_chans: Input channels.
            embed_dim: Width of a token.
            strict_img_size: Refuse inputs of another size than img_size.
        """
        super().__init__()
        _check_size('num_frames', num_frames)
        _check_size('tubelet_size', tubelet_size)
        if num_frames % tubelet_size:
            raise ValueError(f'num_frames: got {num_frames}, needs a multiple of tubelet_size {tubelet_size}')
        self.in_chans = in_chans
        self.num_frames = num_frames
        self.tubelet_size = tubelet_size
        self.strict_img_size = strict_img_size
        self.is_clip = num_frames > 1
        self._set_sizes(to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(patch_size if stride is None else stride))
        self.proj = self._conv(in_chans, embed_dim, device=device, dtype=dtype)

    def _set_sizes(self, img_size: Tuple[int, int], patch_size: Tuple[int, int], stride: Tuple[int, int]) -> None:
        _check_size('patch_size', patch_size)
        _check_size('stride', stride)
        _check_size('img_size', img_size, patch_size)
        self.img_size = img_size
        self.patch_size = patch_size
        self.stride = stride
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _conv(self, in_chans: int, embed_dim: int, **dd) -> nn.Module:
        if self.is_clip:
            return nn.Conv3d(
                in_chans, embed_dim, (self.tubelet_size, *self.patch_size), (self.tubelet_size, *self.stride), **dd)
        return nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, **dd)

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Rows and columns of patches for an image size in pixels."""
        return (
            (img_size[0] - self.patch_size[0]) // self.stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.stride[1] + 1,
        )

    def feat_ratio(self, as_scalar: bool = True) -> Union[Tuple[int, int], int]:
        """Pixels between neighbouring tokens."""
        return max(self.stride) if as_scalar else self.stride

    def set_input_size(self, img_size: Optional[Size2] = None, patch_size: Optional[Size2] = None) -> None:
        """Change the image and patch size; non-overlapping patches stay so, kernels are resampled (FlexiViT)."""
        old_patch_size = self.patch_size
        patch_size = old_patch_size if patch_size is None else to_2tuple(patch_size)
        self._set_sizes(
            self.img_size if img_size is None else to_2tuple(img_size),
            patch_size,
            patch_size if self.stride == old_patch_size else self.stride,
        )
        if patch_size != old_patch_size:
            old = self.proj
            self.proj = self._conv(
                old.in_channels, old.out_channels, device=old.weight.device, dtype=old.weight.dtype)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_kernel(old.weight, self.patch_size))
                self.proj.bias.copy_(old.bias)
            for new_p, old_p in zip(self.proj.parameters(), old.parameters()):
                new_p.requires_grad_(old_p.requires_grad)
            self.proj.train(old.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: Images (B, C, H, W), or clips (B, C, T, H, W).

        Returns:
            Tokens (B, T', H', W', embed_dim), T' = 1 for images.
        """
        if self.is_clip:
            _assert(x.ndim == 5, f'x: got {x.ndim} dimensions, needs clips (batch, channels, frames, height, width)')
            frames = x.shape[2]
            _assert(frames == self.num_frames, f'x: got {frames} frames, needs num_frames {self.num_frames}')
        else:
            _assert(x.ndim == 4, f'x: got {x.ndim} dimensions, needs images (batch, channels, height, width)')
        chans, H, W = x.shape[1], x.shape[-2], x.shape[-1]
        _assert(chans == self.in_chans, f'x: got {chans} channels, needs in_chans {self.in_chans}')
        for name, n, i in (('height', H, 0), ('width', W, 1)):
            size, patch, stride = self.img_size[i], self.patch_size[i], self.stride[i]
            got = _got(name, n)
            if self.strict_img_size:
                _assert(n == size, f"{got}, needs the model's img_size {size}")
            else:
                _assert(n >= patch, f'{got}, needs at least the patch size {patch}')
                _assert(n % stride == 0, f'{got}, needs a multiple of the stride {stride}')
        x = self.proj(x)
        if not self.is_clip:
            x = x.unsqueeze(2)
        return x.permute(0, 2, 3, 4, 1)
