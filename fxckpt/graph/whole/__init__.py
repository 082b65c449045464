"""The one graph of a whole step: forward, backward, clipping, ``opt.step()`` and what follows, in pieces around the step."""
