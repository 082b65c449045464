"""Its components: checkpoint managers only."""
