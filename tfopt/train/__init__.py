"""Keras model in, Keras model out."""
