"""SPIR-V numbers entered by hand: SPV_KHR_cooperative_matrix is newer than the grammar in Debian 12.

Source: the SPIR-V registry's text of SPV_KHR_cooperative_matrix, revision 2.
"""

from __future__ import annotations

COOP_OPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TypeCooperativeMatrixKHR": (4456, ("IdResult", "IdRef", "IdScope", "IdRef", "IdRef", "IdRef")),
    "CooperativeMatrixLoadKHR": (4457, ("IdResultType", "IdResult", "IdRef", "IdRef", "IdRef?", "MemoryAccess?")),
    "CooperativeMatrixStoreKHR": (4458, ("IdRef", "IdRef", "IdRef", "IdRef?", "MemoryAccess?")),
    "CooperativeMatrixMulAddKHR": (4459, ("IdResultType", "IdResult", "IdRef", "IdRef", "IdRef", "CooperativeMatrixOperands?")),
}

COOP_ENUMS: dict[str, dict[str, int]] = {
    "Capability": {"CooperativeMatrixKHR": 6022},
    "CooperativeMatrixLayout": {"RowMajorKHR": 0, "ColumnMajorKHR": 1},
    "CooperativeMatrixUse": {"MatrixAKHR": 0, "MatrixBKHR": 1, "MatrixAccumulatorKHR": 2},
    "CooperativeMatrixOperands": {
        "MatrixASignedComponentsKHR": 1,
        "MatrixBSignedComponentsKHR": 2,
        "MatrixCSignedComponentsKHR": 4,
        "MatrixResultSignedComponentsKHR": 8,
    },
}
