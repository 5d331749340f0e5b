"""What TidalDecode costs in time: single operations, the attention of a decode step, whole decode steps."""
