"""Keras 3 on its torch backend: our LSTM and Adam, `compile` and `fit` unchanged."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

from fastopt.integrations.keras import LSTM, Adam

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.layers.Embedding(50, 16, mask_zero=True),
        LSTM(32),
        keras.layers.Dense(2, activation="softmax"),
    ]
)
model.compile(Adam(1e-2), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
tokens = np.random.default_rng(0).integers(0, 50, (512, 20))
model.fit(tokens, (tokens > 25).sum(1) > 9, batch_size=32, epochs=3, verbose=2)
