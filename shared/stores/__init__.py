"""Where objects lie: the `ObjectStore` and `Transfer` ports, a directory, S3, signed URLs."""
