import gc

import torch

from minimind.inference.decode.step import empty_in_huge_pages

SHAPES = [(3, 5), (1000, 999), (7,), (2, 3, 4)]


def test_tensors_lie_apart_and_aligned():
    tensors = empty_in_huge_pages(SHAPES, torch.bfloat16, torch.device("cpu"))
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    for i, (tensor, shape) in enumerate(zip(tensors, SHAPES, strict=True)):
        assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == i).all()


def test_one_tensor_outlives_the_others():
    *_, last = empty_in_huge_pages(SHAPES, torch.float32, torch.device("cpu"))
    last.fill_(5)
    gc.collect()
    assert (last == 5).all()


def test_no_tensor_needs_no_memory():
    assert empty_in_huge_pages([], torch.float32, torch.device("cpu")) == []
    (nothing,) = empty_in_huge_pages([(0, 4)], torch.float32, torch.device("cpu"))
    assert nothing.shape == (0, 4)
