"""The paper's evaluation on any base model and data set: data, splits, partitions."""
