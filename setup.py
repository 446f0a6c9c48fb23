"""Builds the CPU kernels, which the package can do without; everything else is in setup.cfg."""
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError


class BuildKernels(build_ext):
    """Builds a plain shared library: it is loaded with ctypes and knows neither Python nor PyTorch."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace('.', '/') + '.so'

    def get_export_symbols(self, ext: Extension) -> list:
        return ext.export_symbols  # no PyInit function

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            if '-fopenmp' not in ext.extra_compile_args:
                raise
            self.announce('OpenMP is missing: building single-threaded kernels', level=3)
            for args in (ext.extra_compile_args, ext.extra_link_args):
                args.remove('-fopenmp')
            super().build_extension(ext)


class BuildWheel(bdist_wheel):
    """Tags the wheel as good for every Python: the kernels know none."""

    def get_tag(self) -> tuple:
        return 'py3', 'none', super().get_tag()[2]


kernels = Extension(
    'timm_ssm.ops.backends._native',
    sources=['csrc/native.cpp'],
    depends=['csrc/conv.h', 'csrc/kernels.h', 'csrc/native.h', 'csrc/scan.h', 'csrc/simd.h'],
    extra_compile_args=[
        '-std=c++17', '-O3', '-g0', '-fopenmp', '-fvisibility=hidden', '-ffp-contract=fast', '-fno-math-errno',
        '-fno-trapping-math', '-Wno-psabi', '-Wno-maybe-uninitialized',
    ],
    extra_link_args=['-fopenmp'] if sys.platform != 'win32' else [],
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={'bdist_wheel': BuildWheel, 'build_ext': BuildKernels})
