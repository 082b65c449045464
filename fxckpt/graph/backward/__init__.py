"""The passes that put a layer's update into the compiled backward."""
