"""Packaging. The version below is the only one: `importlib.metadata` reads it back."""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).parent / "README.md"

# Lower bounds: of libraries that still change, the release line this is tested with;
# of others, the release that brought what is used here. There are no upper bounds, so
# that Python 3.11 (jax 0.10) and later ones (jax 0.12) each get what fits them.
CORE = [
    "absl-py",
    "array-record",
    "clu",
    "etils[epath]",
    "flax>=0.12",
    "google-crc32c",  # the checksum of TFRecord files
    "grain>=0.2.18",
    "importlib_resources",  # tensorflow-datasets imports it without asking for it
    "jax>=0.10",
    "jinja2",
    "matplotlib>=3.7",  # legends outside the axes
    "ml-collections",
    "ml_dtypes",  # bfloat16 in files
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow",
    "scikit-image",  # carries the photographs of the demo
    "scikit-learn>=1.5",  # t-SNE, whose `n_iter` became `max_iter` in 1.5
    "scipy",  # splines, to resize tables of relative positions
    "tensorflow-datasets>=4.9.7",
    "tqdm",
]

TEST = [
    "hypothesis",
    "ipykernel",  # with nbclient and nbformat: the notebooks are run
    "nbclient",
    "nbformat",
    "pytest>=8.0",
    "pytest-xdist",
]

# Whose files and numbers the tests compare ours with; nothing else imports them. The
# versions are those that were compared.
PEERS = [
    "huggingface-hub",
    "onnx",
    "safetensors",
    "timm>=1.0.20",
    "torch==2.13.0",
    "transformers>=5.0",
]

# The TPU compiler, where there is no TPU; there are wheels for these machines alone.
LIBTPU = "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"

EXTRAS = {
    "tpu": ["jax[tpu]", "etils[epath-gcs]"],  # gs:// paths
    "aot": ["libtpu"],
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    "tensorboard": ["tensorboard", "tensorflow"],  # clu's writer needs both
    "tf": ["tensorflow"],  # to prepare data sets; training never imports it
    # .onnx files and Hugging Face's hub; all other checkpoints are read and written
    # without their libraries.
    "convert": ["huggingface-hub", "onnx", "protobuf"],
    "peers": PEERS,
    "test": TEST,
    "dev": [*TEST, *PEERS, LIBTPU, "ruff>=0.9"],
}

setup(
    name="clvsmim",
    version="0.1.0",
    description="What do self-supervised vision transformers learn? "
    "Contrastive learning against masked image modelling, in JAX.",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The recipes lie at the top, where people look for them, and ship in the package.
    packages=[*find_packages(include=["clvsmim", "clvsmim.*"]), "clvsmim.configs"],
    package_dir={"clvsmim.configs": "configs"},
    package_data={"clvsmim.report": ["*.j2"], "clvsmim.zoo": ["*/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["clvsmim = clvsmim.cli:main"]},
    keywords="self-supervised learning, vision transformer, JAX, MoCo v3, MAE, SimMIM",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
