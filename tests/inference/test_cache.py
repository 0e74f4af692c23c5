import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minimind import ModelConfig
from minimind.inference.decode.kv_cache import PagedCache, cache_pages
from minimind.inference.scheduler import PagePool, page_key

PAGES, SIZE = 6, 2


class Pool(RuleBasedStateMachine):
    """Sequences that take, share, publish and release pages; `content` has the true content of each page."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.sequences: list[list[int]] = []  # the pages that each holds
        self.keys: list[list[bytes]] = []
        self.content: dict[int, bytes | None] = {}  # the key of what was written there last

    @rule(tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE))
    def begin(self, tokens):
        keys = []
        for i in range(len(tokens) // SIZE):
            keys.append(page_key(keys[-1] if keys else b"", tokens[i * SIZE : (i + 1) * SIZE]))
        before = self.pool.available
        pages = self.pool.find(keys)
        for page, key in zip(pages, keys, strict=False):
            assert self.content[page] == key  # a found page holds just those tokens, and was not overwritten
        for key in keys[len(pages) :]:
            page = self.pool.take()
            if page is None:
                assert self.pool.available == 0
                self.pool.release(pages)
                assert self.pool.available <= before
                return
            self.content[page] = key
            pages.append(page)
        for page, key in zip(pages, keys, strict=True):
            self.pool.publish(page, key)
        self.sequences.append(pages)
        self.keys.append(keys)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        pages = data.draw(st.sampled_from(self.sequences))
        self.pool.share(pages)
        self.sequences.append(pages.copy())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index))

    @rule()
    def take_alone(self):
        page = self.pool.take()
        assert (page is None) == (self.held() == set(range(PAGES)))
        if page is not None:
            assert all(page not in pages for pages in self.sequences)
            self.content[page] = None
            self.sequences.append([page])

    @rule()
    def forget(self):
        self.pool.forget()
        assert self.pool.find([page_key(b"", [0, 0]), page_key(b"", [0, 1])]) == []
        assert self.pool.cached == 0

    def held(self):
        return {page for pages in self.sequences for page in pages}

    @invariant()
    def every_page_is_counted(self):
        for page in range(PAGES):
            assert self.pool.references(page) == sum(pages.count(page) for pages in self.sequences)
        assert self.pool.available == PAGES - len(self.held())
        assert self.pool.cached <= self.pool.available

    @invariant()
    def no_page_is_in_two_places(self):
        lists = [*self.pool._free, *self.pool._idle]
        assert len(lists) == len(set(lists))
        assert not set(lists) & self.held()
        assert set(self.pool._page_of.values()) == self.pool._key_of.keys()

    def teardown(self):
        for pages in self.sequences:
            self.pool.release(pages)
        self.sequences = []
        assert self.pool.available == PAGES  # no leak


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


def test_the_longest_unused_page_goes_first_and_a_chain_from_its_end():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    keys = [b"a", b"ab", b"c"]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages[:2])  # a chain: "a" then "ab"
    pool.release(pages[2:])
    assert pool.take() == pages[1]  # "ab", before the "a" that it needs
    assert pool.find([b"a"]) == pages[:1]
    assert pool.find([b"c"]) == pages[2:]
    assert pool.take() is None


def test_nothing_is_found_without_reuse():
    pool = PagePool(2, reuse=False)
    page = pool.take()
    pool.publish(page, b"a")
    pool.release([page])
    assert pool.find([b"a"]) == []


def test_a_key_stands_for_everything_before_it():
    assert page_key(b"", [1, 2]) != page_key(b"", [2, 1])
    assert page_key(page_key(b"", [1]), [2]) != page_key(page_key(b"", [3]), [2])
    assert page_key(b"", [1]) != page_key(b"", [1, 0])


CONFIG = ModelConfig(32, 2, 4, 2, 16, 48, 50)
TOKEN_NUMBERS = 2 * 2 * 2 * 16  # k and v, layers, heads, head_dim
TOKEN_BYTES = 4 * TOKEN_NUMBERS
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def pages(**budget):
    options = {"kv_bytes": None, "kv_tokens": None, "useful_tokens": 160, "page_size": 16, **budget}
    return cache_pages(TOKEN_BYTES, torch.device("cpu"), **options)


def test_budget():
    assert pages(kv_tokens=100) == 6
    assert pages(kv_bytes=5 * 16 * TOKEN_BYTES + 1) == 5
    assert pages() == 10
    assert pages(useful_tokens=10**9) == (512 << 20) // (16 * TOKEN_BYTES)
    with pytest.raises(ValueError, match=f"kv_bytes=100 is less than one page.*{16 * TOKEN_BYTES} bytes"):
        pages(kv_bytes=100)
    with pytest.raises(ValueError, match="kv_tokens=15 is less"):
        pages(kv_tokens=15)
    with pytest.raises(ValueError, match="give one of them"):
        pages(kv_tokens=100, kv_bytes=100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_has_its_stated_size_and_copies_whole_pages(dtype):
    cache = PagedCache.allocate(CONFIG, 5, 4, dtype, torch.device("cpu"))
    assert cache.bytes == 5 * 4 * TOKEN_NUMBERS * dtype.itemsize == cache.k.nbytes + cache.v.nbytes
    for tensor in (cache.k, cache.v):
        tensor.copy_(torch.randn(tensor.shape))
    k, v = cache.k.float(), cache.v.float()
    cache.copy_pages(torch.tensor([0, 2]), torch.tensor([3, 4]))
    for tensor, old in ((cache.k.float(), k), (cache.v.float(), v)):
        assert torch.equal(tensor[:, [3, 4]], old[:, [0, 2]])
        assert torch.equal(tensor[:, :3], old[:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_read_as_they_were_written_but_for_rounding(dtype):
    cache = PagedCache.allocate(CONFIG, 5, 4, dtype, torch.device("cpu"))  # NaN in tests
    if cache.k_scale is not None:
        cache.k_scale.copy_(torch.tensor([[1.0, 1.0], [0.25, 4.0]]))
    layer, slots = cache.layer(1), torch.tensor([17, 3, 9])
    k, v = (torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    layer.write(slots, k, v)
    scale = torch.tensor([0.25, 4.0])[:, None] if dtype == torch.float8_e4m3fn else 1
    found_k, found_v = layer.read(slots[[2, 0]], torch.float32)
    assert torch.equal(found_k, (k / scale).to(dtype).float()[[2, 0]] * scale)
    assert torch.equal(found_v, v.to(dtype).float()[[2, 0]])
    written = cache.k[1].flatten(0, 1).float()[:, 0, 0].isfinite().nonzero().flatten()
    assert written.tolist() == [3, 9, 17] and cache.k[0].float().isnan().all()
