"""Core ML programs (.mlpackage) read and run without a Mac, and without coremltools' own loader.

    storage.py     constants: the layout of weight.bin, packed bits, dtypes
    package.py     Manifest.json and model.mlmodel -> functions and operations
    weights.py     compressed weights, dequantized some rows at a time
    ops.py         one small function for each operation
    evaluator.py   runs a function of a package, operation by operation

coremltools' loader (milproto.load) builds a second program through the builder, which takes seconds to import,
infers types anew instead of reading those that the file declares, and holds each sub-byte weight at a byte or more
for each element; here constants stay in the mapped file until they are used.
"""
