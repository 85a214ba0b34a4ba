"""A slow reference of flash_attn's API, to check the FlashAttention-2 path where neither GPU nor library are at hand.

It holds callers to the contract of the real library: half precision, layout `(batch, tokens, heads, head_dim)` or
packed `(tokens, heads, head_dim)` with cumulative lengths, and it records the arguments of every call.
"""

import types

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input


class FlashAttnReference:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        self.calls.append(("dense", {"shape": tuple(q.shape), "causal": causal, "dropout_p": dropout_p}))
        assert q.ndim == 4
        assert q.dtype in (torch.float16, torch.bfloat16)
        return self._attend(q, k, v, softmax_scale)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        lengths, of_keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        self.calls.append(("varlen", {"lengths": lengths, "causal": causal, "dropout_p": dropout_p}))
        assert q.ndim == 3
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(of_keys))
        parts = [q.split(lengths), k.split(of_keys), v.split(of_keys)]
        attended = [self._attend(*(x[None] for x in one), softmax_scale)[0] for one in zip(*parts, strict=True)]
        return torch.cat(attended)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5), dim=-1)
        return (weights @ v).transpose(1, 2).to(torch.bfloat16)

    def modules(self) -> dict[str, types.ModuleType]:
        """What `import flash_attn` finds."""
        package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
        package.flash_attn_func = self.flash_attn_func
        package.flash_attn_varlen_func = self.flash_attn_varlen_func
        package.flash_attn_with_kvcache = None
        padding.pad_input, padding.unpad_input = _pad_input, _unpad_input
        package.bert_padding = padding
        return {"flash_attn": package, "flash_attn.bert_padding": padding}
