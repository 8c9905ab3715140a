"""AdapterBatch: segments of tokens that share an adapter."""

import pytest
import torch

from t2l_engine import AdapterBatch


def test_batch_from_rows():
    batch = AdapterBatch.from_rows([1, -1, 0], 4)
    assert batch.seg_indptr.tolist() == [0, 4, 8, 12] and batch.seg_indptr.dtype == torch.int32
    assert batch.seg_adapters.tolist() == [1, -1, 0] and batch.seg_adapters.dtype == torch.int32
    assert batch.max_seg_len == 4 and batch.num_tokens == 12
    flat = torch.zeros(2, dtype=torch.int32)
    strided = torch.zeros(3, 2, dtype=torch.int32)[:, 0]
    assert AdapterBatch.from_rows(strided, 4).seg_adapters.is_contiguous()
    other = flat.view(1, 2), flat.to(torch.uint32), flat.to(torch.complex64)
    for ids in ([0.5], [True], [True, 1], *other, [2**31], [2**70], ["0"]):
        with pytest.raises(ValueError, match="ids: expected"):
            AdapterBatch.from_rows(ids, 4)
    for seq_len in (-1, 2**30, 2**31):
        with pytest.raises(ValueError, match="seq_len: expected 0 to 2147483647 tokens in all rows"):
            AdapterBatch.from_rows([0, 1], seq_len)
