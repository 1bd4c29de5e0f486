"""Quantization of ONNX graphs: pure functions, one model in, another out.

A model here is an `onnx.ModelProto` with its weights inside; no function changes the one it
is given. Arrays go in as feeds (name of a graph input -> array, batch axis first).
"""
