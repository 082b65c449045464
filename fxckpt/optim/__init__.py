"""Runs the step of one optimizer: bound parameters, traced programs, the calls that update them."""
