"""pyarrow reading every data file of a dataset whole, page cache warm.

python pyarrow_read.py DATASET --threads 1
"""

import argparse
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from timing import figures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    pa.set_cpu_count(args.threads)
    files = sorted((args.dataset / "data").rglob("*.parquet"))
    times = []
    for rep in range(args.reps + 1):
        start = time.perf_counter()
        tables = [pq.read_table(file, use_threads=args.threads > 1) for file in files]
        if rep:
            times.append((time.perf_counter() - start) * 1e3)
    total = {"read_ms": figures(times), "bytes": sum(t.nbytes for t in tables), "pyarrow": pa.__version__}
    print(json.dumps(total))


if __name__ == "__main__":
    main()
