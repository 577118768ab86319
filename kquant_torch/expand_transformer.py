"""Encoders and decoders of transformers, rewritten as their layers, and those as attention, norms and sums."""

from __future__ import annotations

from typing import Any

from torch import nn

from kquant_torch.expand import Site, expands_module

PADDED = "a transformer with a key padding mask, which follows the model's inputs, has no integer form"


@expands_module(nn.TransformerEncoder)
def _encoder(site: Site, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
    if src_key_padding_mask is not None:
        return site.refuse(PADDED)
    x = src
    for i in range(len(site.module.layers)):
        x = site.call(f"layers.{i}", x) if mask is None else site.call(f"layers.{i}", x, mask)
    return x if site.module.norm is None else site.call("norm", x)


@expands_module(nn.TransformerDecoder)
def _decoder(
    site: Site, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None,
    tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None, memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    if tgt_key_padding_mask is not None or memory_key_padding_mask is not None:
        return site.refuse(PADDED)
    x = tgt
    for i in range(len(site.module.layers)):
        x = site.call(f"layers.{i}", x, memory, tgt_mask, memory_mask)
    return x if site.module.norm is None else site.call("norm", x)


@expands_module(nn.Transformer)
def _transformer(
    site: Site, src: Any, tgt: Any, src_mask: Any = None, tgt_mask: Any = None, memory_mask: Any = None,
    src_key_padding_mask: Any = None, tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None,
    src_is_causal: Any = None, tgt_is_causal: Any = None, memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    padding = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
    if any(mask is not None for mask in padding):
        return site.refuse(PADDED)
    memory = site.call("encoder", src, src_mask)
    return site.call("decoder", tgt, memory, tgt_mask, memory_mask)


def _attended(site: Site, attention: str, dropout: str, x: Any, memory: Any, mask: Any) -> Any:
    masked = () if mask is None else (None, False, mask)  # padding mask, whether weights are wanted, mask
    return site.call(dropout, site.call(attention, x, memory, memory, *masked)[0])


def _fed(site: Site, dropout: str, x: Any) -> Any:
    hidden = site.module.activation(site.call("linear1", x))
    return site.call(dropout, site.call("linear2", site.call("dropout", hidden)))


def _branches(site: Site, x: Any, *branches: Any) -> Any:
    """`x` with each branch added in turn, normalized before the branch or behind the sum as the layer says."""
    for i, branch in enumerate(branches, 1):
        if site.module.norm_first:
            x = x + branch(site.call(f"norm{i}", x))
        else:
            x = site.call(f"norm{i}", x + branch(x))
    return x


@expands_module(nn.TransformerEncoderLayer)
def _encoder_layer(
    site: Site, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    if src_key_padding_mask is not None:
        return site.refuse(PADDED)
    return _branches(
        site,
        src,
        lambda x: _attended(site, "self_attn", "dropout1", x, x, src_mask),
        lambda x: _fed(site, "dropout2", x),
    )


@expands_module(nn.TransformerDecoderLayer)
def _decoder_layer(
    site: Site, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None,
    tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False, memory_is_causal: bool = False,
) -> Any:  # fmt: skip
    if tgt_key_padding_mask is not None or memory_key_padding_mask is not None:
        return site.refuse(PADDED)
    return _branches(
        site,
        tgt,
        lambda x: _attended(site, "self_attn", "dropout1", x, x, tgt_mask),
        lambda x: _attended(site, "multihead_attn", "dropout2", x, memory, memory_mask),
        lambda x: _fed(site, "dropout3", x),
    )
