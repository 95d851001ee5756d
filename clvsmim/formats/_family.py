"""What a family of checkpoint files is, and how one looks at a file to know it."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from clvsmim.formats._evaluation import Evaluation
from clvsmim.formats._positions import kind_of_table
from clvsmim.formats._rules import Drop, Given, Leaves, Rule

# The path of dict keys to a tensor, "state_dict/", and what DataParallel puts before.
PATH = r"(?:\w+/)*(?:module\.)?"


class Look:
    """The names and shapes in a file, and questions about them."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.tensors = tensors

    def has(self, expression: str) -> bool:
        """Whether some name ends in something that fits."""
        return any(re.search(f"(?:{expression})$", name) for name in self.tensors)

    def shape(self, expression: str) -> tuple[int, ...]:
        """Of the first tensor whose name ends so; () without one."""
        for name, x in self.tensors.items():
            if re.search(f"(?:{expression})$", name):
                return tuple(x.shape)
        return ()

    @cached_property
    def timm(self) -> bool:
        """Names of timm's ViT: MoCo v3, MAE, DINO, iBOT, DeiT and timm's own."""
        start = r"(^|[/.])blocks\.0\.(0\.)?attn\."  # DINOv2 trains chunks of blocks
        has = self.has(start + r"qkv\.weight")
        return has and not self.has(start + "q_bias")

    @cached_property
    def table(self) -> str:
        """The absolute positions: "moco_sincos", "mae_sincos", "learned" or "none"."""
        for name, x in self.tensors.items():
            if (
                re.search(r"(^|[/.])(pos_embed|position_embeddings)$", name)
                and len(x.shape) == 3
            ):
                return kind_of_table(np.asarray(x))[0]
        return "none"


class Family(NamedTuple):
    """One family of files: how to know it, its rule table, what it leaves open.

    Attributes:
      title: what a user reads.
      looks_for: its signs in words, for the message that nothing fits.
      recognise: the evidence that a file is of it, in words; "" if there is none.
      branches: name -> (regular expression at the beginning of a name, what to put in
        its place); a file may hold two encoders, the first branch is used if none is
        asked for. What fits no branch belongs to another one.
      rules, givens, drops: the table; see `_rules`.
      needs: leaves that every such file has; "a|b" is either.
      fields: of `vit.Spec`, which the tensors cannot tell.
      can: field of `vit.Spec` -> the values that its code, or what is written beside
        its tensors, can have; any where a field is not named.
      classifiers: (what a classifier reads, its own norm) as its code can have them:
        "cls", "patches" (their mean) or "tokens" (of an encoder without CLS), and
        "none", "layer" (in the place of the encoder's last norm), "both" (behind that
        norm) or "batch" (a BatchNorm).
      heads_of_s: heads of its 384-wide ViT.
      evaluation: how its images are prepared; None for files of ours, whose run
        knows.
      aliases: (expression, replacement): other spellings of its names.
      prepare: tensors -> tensors, before anything else (to unstack blocks).
      fold: (leaves, their config) -> notes; changes leaves read into canonical ones.
      unfold: (leaves, folded) -> leaves in the form that the rules can write.
      config: (leaves, encoder fields, decoder heads, what a classifier reads) -> what a
        library needs beside the tensors to build the network.
      alone: what to say of an encoder without the heads that such files may have.
      checked: against which library's own writer or code the table was tested.
    """

    title: str
    looks_for: str
    recognise: Callable[[Look], str]
    branches: dict[str, tuple[tuple[str, str], ...]]
    rules: tuple[Rule, ...]
    givens: tuple[Given, ...] = ()
    drops: tuple[Drop, ...] = ()
    needs: tuple[str, ...] = ()
    fields: dict[str, Any] = {}
    can: dict[str, tuple] = {"mlp": ("gelu",), "norm_eps": (1e-6,)}
    classifiers: tuple[tuple[str, str], ...] = (("cls", "none"), ("patches", "layer"))
    heads_of_s: int = 6
    evaluation: Evaluation | None = Evaluation()
    aliases: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    fold: Callable[[Leaves, Mapping], list[str]] | None = None
    unfold: Callable[[Leaves, tuple[str, ...]], Leaves] | None = None
    config: Callable[[Leaves, Mapping, int, str], dict] | None = None
    alone: str = "an encoder alone"
    checked: str = ""


CORE = (
    "encoder/cls_token",
    "encoder/patch_embed/kernel",
    "encoder/patch_embed/bias",
    "encoder/block_0/attn/q/kernel",
    "encoder/block_0/mlp/fc2/kernel",
)


def under(prefix: str, rules: tuple) -> tuple:
    """The same rules for names that begin with a prefix."""
    return tuple(rule._replace(theirs=prefix + rule.theirs) for rule in rules)
