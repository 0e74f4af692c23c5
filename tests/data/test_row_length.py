"""How long rows are where nobody says: as the data asks for."""

import numpy as np
import pytest

from minimind.data.row_length import row_length, tokens_in_rows
from tests.data.fake import corpus_of, ids_of, some_texts


@pytest.mark.parametrize(
    ("long", "row", "reason"),
    [
        (0, 512, "--seq-len 512: 0.0% of 1,000 chats are longer; shorter rows fill worse"),
        (10, 512, "--seq-len 512: 1.0% of 1,000 chats are longer; shorter rows fill worse"),
        (11, 1024, "--seq-len 1024: 0.0% of 1,000 chats are longer, 1.1% than 512"),
    ],
)
def test_one_document_in_a_hundred_may_be_longer(long, row, reason):
    lengths = np.full(1000, 512)
    lengths[:long] = 513
    assert row_length(lengths, 512, 4096, "chats") == (row, reason)


def test_rows_stay_within_their_bounds():
    assert row_length(np.full(10, 9000), 512, 4096, "chats")[0] == 4096
    assert row_length(np.full(10, 9000), 512, 512, "chats")[0] == 512
    assert row_length(np.full(10, 9), 256, 4096, "chats")[0] == 256


def test_a_document_takes_a_place_for_each_token_it_predicts(tmp_path):
    texts = some_texts(50)
    corpus = corpus_of(tmp_path, texts)
    assert tokens_in_rows(corpus).tolist() == [len(ids_of(text)) - 1 for text in texts]
