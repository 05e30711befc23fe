"""The way of the data: model -> blocks -> statistics -> method -> packed layer -> shard and journal -> saved model."""
