"""Tests against the trainers that people use, in an environment of their own: ``make test-stacks``."""

import warnings
from importlib.util import find_spec

import torch

NEEDED = ("accelerate", "deepspeed", "lightning", "peft", "timm", "torchvision", "transformers")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]

if not collect_ignore_glob:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others, while they are imported
        try:
            import torchvision
        except RuntimeError:
            # The index has one that is compiled for another build of torch. Its Python part, which timm and
            # others import, wants no more of the compiled part than these operators' names.
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor"
                )
            import torchvision
        import accelerate
        import deepspeed
        import lightning
        import peft
        import timm
        import transformers

    assert all((torchvision, accelerate, deepspeed, lightning, peft, timm, transformers))
