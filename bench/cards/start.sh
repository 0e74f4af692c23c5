#!/usr/bin/env bash
# Runs bench/card.py on a machine without a network, from the folder that bench/card_pack.py makes.
#
#   bash start.sh --minutes 9 --out DIR
#
# $PYTHON: the interpreter with PyTorch, python3 by default. $CARD_PLACE: the folder of the source and the results.
set -euo pipefail

pack=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=${CARD_PLACE:-${TMPDIR:-/tmp}/minimind-card}
python=$(command -v "${PYTHON:-python3}")
read -r commit <"$pack/commit"
if [[ ! -e $place/$commit ]]; then
    rm -rf "$place/source" "$place/site"
    mkdir -p "$place/source"
    tar xzf "$pack/source.tar.gz" -C "$place/source"
    "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --no-deps --no-index \
        --target "$place/site" "$pack"/wheels/*.whl
    touch "$place/$commit"
fi
export PYTHONPATH=$place/source:$place/site MINIMIND_COMMIT=$commit MINIMIND_CACHE=$place/cache
export PATH=$PATH:/usr/local/cuda/bin # for compute-sanitizer
mkdir -p "$MINIMIND_CACHE"
cp -r "$pack/tokens" "$MINIMIND_CACHE/"
exec "$python" "$place/source/bench/card.py" --data "$pack/text.jsonl.zst" --work "$place/work" "$@"
