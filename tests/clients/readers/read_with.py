"""Read every column of a Parquet file with one library, and print what it says as JSON.

    python read_with.py READER FILE     (READER: duckdb, fastparquet, pandas, polars, pyarrow, datasets, spark)

Runs in the environment of that library alone, so it imports nothing of ferkd-data, NumPy or PyArrow itself. Output:
{"version": "1.4.5", "columns": {NAME: [values] or {"error": "..."}}}; null and NaN are null, bytes are hexadecimal.
"""

import json
import math
import sys
import tempfile

COLUMNS = (
    "key image_digest height width target box_top box_left box_height box_width flip class_index class_prob "
    "target_prob bucket"
).split()


def duckdb(path):
    import duckdb

    return duckdb.__version__, lambda name: [row[0] for row in duckdb.sql(f"select {name} from '{path}'").fetchall()]


def fastparquet(path):
    import fastparquet

    file = fastparquet.ParquetFile(path)
    # A list column goes by its own name in newer versions, by its path in older ones.
    return fastparquet.__version__, lambda name: file.to_pandas(columns=[name])[name].tolist()


def pandas(path):
    import pandas

    return pandas.__version__, lambda name: pandas.read_parquet(path, columns=[name])[name].tolist()


def polars(path):
    import polars

    return polars.__version__, lambda name: polars.read_parquet(path, columns=[name])[name].to_list()


def pyarrow(path):
    import pyarrow
    import pyarrow.parquet

    return pyarrow.__version__, lambda name: pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()


def datasets(path):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=tempfile.mkdtemp())
    return datasets.__version__, lambda name: list(rows[name])


def spark(path):
    import pyspark
    from pyspark.sql import SparkSession

    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    return pyspark.__version__, lambda name: [row[0] for row in session.read.parquet(path).select(name).collect()]


def plain(value):
    """Python's own values, whatever the library gave."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def main(reader, path):
    version, read = globals()[reader](path)
    columns = {}
    for name in COLUMNS:
        try:
            columns[name] = plain(read(name))
        # Rust's panics and Java's errors are not of Exception.
        except BaseException as error:
            said = str(error).strip().splitlines() or [""]
            columns[name] = {"error": f"{type(error).__name__}: {said[0]}"[:200]}
    print(json.dumps({"version": version, "columns": columns}))


if __name__ == "__main__":
    main(*sys.argv[1:])
