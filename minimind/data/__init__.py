"""Turn text into batches: read files, tokenize them once into a memory-mapped cache, pack rows, and load batches."""

from minimind.data.builtin.chat import builtin_conversations
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.data.cache import Corpus, open_conversations, open_corpus
from minimind.data.loader import Batch, PackedLoader
from minimind.data.paths import expand_paths
from minimind.data.reader import iter_texts, read_documents

__all__ = [
    "Batch",
    "Corpus",
    "PackedLoader",
    "builtin_conversations",
    "builtin_corpus",
    "expand_paths",
    "iter_texts",
    "open_conversations",
    "open_corpus",
    "read_documents",
]
