"""Loaders: numpy arrays from files, one module for a family of formats."""
