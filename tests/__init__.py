"""Tests of single modules: no daemon, no network, no real time."""
