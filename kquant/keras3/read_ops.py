def read_operation(r, node, inputs): raise 0
