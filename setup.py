"""Packaging of kquant. Every version range stands here and nowhere else, and is bounded to what the tests run with."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent


def version() -> str:
    """The version stated in kquant/_version.py, read as text so that a build needs none of kquant's dependencies."""
    text = (ROOT / "kquant" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


TENSORFLOW = [
    "tensorflow>=2.21,<2.22",
    "tf-keras>=2.21,<2.22",
    "keras>=3.15,<3.16",
    "ai-edge-litert>=2.3,<2.4",
    "tensorflow-model-optimization>=0.8.1,<0.9",
]
TORCH = ["torch>=2.13,<2.14"]
ONNX = ["onnx>=1.23,<1.24", "onnxruntime>=1.32,<1.33"]
DEMO = ["scikit-learn>=1.9,<2", "matplotlib>=3.11,<4", "tqdm>=4.70,<5"]
TEST = ["pytest>=9.2,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.170,<7"]
# A new ruff formats differently and a new mypy finds more, so these two are held to the minor version.
LINT = ["ruff>=0.17,<0.18", "mypy>=2.4,<2.5"]

setup(
    name="kquant",
    version=version(),
    description="Quantization-aware training for Keras and PyTorch that ends in a checked integer artifact",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["kquant", "kquant.*", "kquant_torch", "kquant_torch.*"]),
    # What the tests run on.
    python_requires=">=3.11,<3.12",
    # wrapt registers the layers when keras is imported after kquant.
    install_requires=["numpy>=2,<3", "wrapt>=2.5,<3"],
    extras_require={
        "tensorflow": TENSORFLOW,
        "torch": TORCH,
        "onnx": ONNX,
        "all": TENSORFLOW + TORCH,
        "demo": DEMO,
        "test": TEST,
        "lint": LINT,
        "dev": TEST + LINT + DEMO,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="quantization, quantization-aware training, keras, tflite, litert, int8, int4, dorefa",
    zip_safe=False,
)
