/* A cuSPARSELt that computes on the host's memory, compiled against the real header: a wrong prototype does not compile.
   It checks what the library asks for (alignment, orders, multiples), counts what is alive, and logs its calls to the
   file that STAND_IN_LOG names. Other variables make it misbehave: see `number`. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cusparseLt.h"

typedef struct { int64_t rows, cols, ld; cudaDataType type; cusparseOrder_t order; int sparse; } Matrix;
typedef struct {
    Matrix a, b, d;
    cusparseOperation_t op_a, op_b;
    cusparseComputeType compute;
    int relu, gelu, scaled;
    void* bias;
} Product;
typedef struct { int id, split_k, mode; } Choice;
typedef struct { Product* product; Choice choice; } Plan;

#define SUCCESS CUSPARSE_STATUS_SUCCESS
#define REFUSED CUSPARSE_STATUS_NOT_SUPPORTED
#define INVALID CUSPARSE_STATUS_INVALID_VALUE

static int alive;
int stand_in_alive(void) { return alive; }

static int number(const char* variable, int otherwise) {
    const char* text = getenv(variable);
    return text && *text ? atoi(text) : otherwise;
}

static void note(const char* format, long a, long b, long c) {
    const char* path = getenv("STAND_IN_LOG");
    FILE* file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, format, a, b, c);
    fputc('\n', file);
    fclose(file);
}

/* What an opaque structure holds: a pointer. */
static int misaligned(const void* opaque) { return (uintptr_t)opaque % 16 != 0; }
static void put(void* opaque, void* what) { memcpy(opaque, &what, sizeof what); ++alive; }
static void* get(const void* opaque) { void* what; memcpy(&what, opaque, sizeof what); return what; }
static cusparseStatus_t end(const void* opaque) { free(get(opaque)); --alive; return SUCCESS; }

cusparseStatus_t cusparseLtInit(cusparseLtHandle_t* handle) {
    if (misaligned(handle)) return INVALID;
    if (number("STAND_IN_NO_DEVICE", 0)) return CUSPARSE_STATUS_NOT_INITIALIZED;
    note("init", 0, 0, 0);
    put(handle, malloc(1));
    return SUCCESS;
}
cusparseStatus_t cusparseLtDestroy(const cusparseLtHandle_t* handle) { return end(handle); }
cusparseStatus_t cusparseLtGetProperty(libraryPropertyType which, int* value) {
    int packed = number("STAND_IN_VERSION", 801);
    *value = which == MAJOR_VERSION ? packed / 10000 : which == MINOR_VERSION ? packed / 100 % 100 : packed % 100;
    return SUCCESS;
}
const char* cusparseLtGetErrorName(cusparseStatus_t status) {
    return status == REFUSED ? "CUSPARSE_STATUS_NOT_SUPPORTED"
         : status == INVALID ? "CUSPARSE_STATUS_INVALID_VALUE" : "CUSPARSE_STATUS_NOT_INITIALIZED";
}
const char* cusparseLtGetErrorString(cusparseStatus_t status) {
    return status == REFUSED ? "operation not supported" : status == INVALID ? "invalid value" : "initialization error";
}

static int size_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_8I: case CUDA_R_8F_E4M3: return 1;
        case CUDA_R_16F: case CUDA_R_16BF: return 2;
        default: return 4;
    }
}

static cusparseStatus_t describe(cusparseLtMatDescriptor_t* descriptor, int64_t rows, int64_t cols, int64_t ld,
                                 uint32_t alignment, cudaDataType type, cusparseOrder_t order, int sparse) {
    int64_t multiple = sparse ? (size_of(type) == 1 ? 32 : 16) : (size_of(type) == 1 ? 16 : size_of(type) == 2 ? 8 : 4);
    if (misaligned(descriptor) || alignment != 16 || ld != (order == CUSPARSE_ORDER_ROW ? cols : rows)) return INVALID;
    if (rows % multiple || cols % multiple) return REFUSED;
    Matrix matrix = {rows, cols, ld, type, order, sparse};
    put(descriptor, memcpy(malloc(sizeof matrix), &matrix, sizeof matrix));
    return SUCCESS;
}
cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t* handle, cusparseLtMatDescriptor_t* descriptor,
                                               int64_t rows, int64_t cols, int64_t ld, uint32_t alignment,
                                               cudaDataType type, cusparseOrder_t order) {
    return describe(descriptor, rows, cols, ld, alignment, type, order, 0);
}
cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t* handle,
                                                    cusparseLtMatDescriptor_t* descriptor, int64_t rows, int64_t cols,
                                                    int64_t ld, uint32_t alignment, cudaDataType type,
                                                    cusparseOrder_t order, cusparseLtSparsity_t sparsity) {
    if (sparsity != CUSPARSELT_SPARSITY_50_PERCENT) return INVALID;
    return describe(descriptor, rows, cols, ld, alignment, type, order, 1);
}
cusparseStatus_t cusparseLtMatDescriptorDestroy(const cusparseLtMatDescriptor_t* descriptor) { return end(descriptor); }

cusparseStatus_t cusparseLtMatmulDescriptorInit(
    const cusparseLtHandle_t* handle, cusparseLtMatmulDescriptor_t* descriptor, cusparseOperation_t op_a,
    cusparseOperation_t op_b, const cusparseLtMatDescriptor_t* a, const cusparseLtMatDescriptor_t* b,
    const cusparseLtMatDescriptor_t* c, const cusparseLtMatDescriptor_t* d, cusparseComputeType compute) {
    if (misaligned(descriptor)) return INVALID;
    Product product = {*(Matrix*)get(a), *(Matrix*)get(b), *(Matrix*)get(d), op_a, op_b, compute};
    put(descriptor, memcpy(malloc(sizeof product), &product, sizeof product));
    --alive; /* the library has no function that ends one */
    return SUCCESS;
}
cusparseStatus_t cusparseLtMatmulDescSetAttribute(const cusparseLtHandle_t* handle,
                                                  cusparseLtMatmulDescriptor_t* descriptor,
                                                  cusparseLtMatmulDescAttribute_t attribute, const void* data,
                                                  size_t size) {
    Product* product = get(descriptor);
    switch (attribute) {
        case CUSPARSELT_MATMUL_ACTIVATION_RELU: product->relu = *(const int*)data; break;
        case CUSPARSELT_MATMUL_ACTIVATION_GELU:
            if (number("STAND_IN_NO_GELU", 0)) return REFUSED;
            product->gelu = *(const int*)data;
            break;
        case CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING: product->scaled = *(const int*)data; break;
        case CUSPARSELT_MATMUL_BIAS_POINTER: product->bias = *(void* const*)data; break;
        default: return INVALID;
    }
    return size == (attribute == CUSPARSELT_MATMUL_BIAS_POINTER ? sizeof(void*) : sizeof(int)) ? SUCCESS : INVALID;
}

cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t* handle,
                                                  cusparseLtMatmulAlgSelection_t* selection,
                                                  const cusparseLtMatmulDescriptor_t* descriptor,
                                                  cusparseLtMatmulAlg_t algorithm) {
    if (misaligned(selection) || algorithm != CUSPARSELT_MATMUL_ALG_DEFAULT) return INVALID;
    Choice choice = {0, 1, 0};
    put(selection, memcpy(malloc(sizeof choice), &choice, sizeof choice));
    return SUCCESS;
}
cusparseStatus_t cusparseLtMatmulAlgSelectionDestroy(const cusparseLtMatmulAlgSelection_t* selection) {
    return end(selection);
}
cusparseStatus_t cusparseLtMatmulAlgSetAttribute(const cusparseLtHandle_t* handle,
                                                 cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t attribute, const void* data,
                                                 size_t size) {
    Choice* choice = get(selection);
    int value = *(const int*)data;
    if (size != sizeof(int)) return INVALID;
    switch (attribute) {
        case CUSPARSELT_MATMUL_ALG_CONFIG_ID: choice->id = value; return SUCCESS;
        case CUSPARSELT_MATMUL_SPLIT_K: choice->split_k = value; return value == -1 ? REFUSED : SUCCESS;
        case CUSPARSELT_MATMUL_SPLIT_K_MODE: choice->mode = value; return SUCCESS;
        default: return INVALID;
    }
}
cusparseStatus_t cusparseLtMatmulAlgGetAttribute(const cusparseLtHandle_t* handle,
                                                 const cusparseLtMatmulAlgSelection_t* selection,
                                                 cusparseLtMatmulAlgAttribute_t attribute, void* data, size_t size) {
    if (attribute != CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID || size != sizeof(int)) return INVALID;
    *(int*)data = number("STAND_IN_ALGORITHMS", 4);
    return SUCCESS;
}

cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t* handle, cusparseLtMatmulPlan_t* plan,
                                          const cusparseLtMatmulDescriptor_t* descriptor,
                                          const cusparseLtMatmulAlgSelection_t* selection) {
    Product* product = get(descriptor);
    Plan made = {product, *(Choice*)get(selection)};
    if (misaligned(plan)) return INVALID;
    if (made.choice.id == number("STAND_IN_REFUSES", -1)) return REFUSED;
    if (product->op_a != CUSPARSE_OPERATION_NON_TRANSPOSE || product->op_b != CUSPARSE_OPERATION_TRANSPOSE
        || !product->a.sparse || product->a.order != CUSPARSE_ORDER_ROW || product->b.order != CUSPARSE_ORDER_ROW
        || product->d.order != CUSPARSE_ORDER_COL || product->a.cols != product->b.cols
        || product->d.rows != product->a.rows || product->d.cols != product->b.rows
        || product->compute != (product->a.type == CUDA_R_8I ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F))
        return REFUSED;
    put(plan, memcpy(malloc(sizeof made), &made, sizeof made));
    note("plan %ld tokens, algorithm %ld, split-k %ld", product->b.rows, made.choice.id, made.choice.split_k);
    return SUCCESS;
}
cusparseStatus_t cusparseLtMatmulPlanDestroy(const cusparseLtMatmulPlan_t* plan) {
    free(((Plan*)get(plan))->product);
    return end(plan);
}
cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t* handle, const cusparseLtMatmulPlan_t* plan,
                                              size_t* size) {
    *size = number("STAND_IN_WORKSPACE", 0);
    return SUCCESS;
}

static float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static float load(const void* data, cudaDataType type, int64_t i) {
    switch (type) {
        case CUDA_R_8I: return ((const int8_t*)data)[i];
        case CUDA_R_16F: return ((const _Float16*)data)[i];
        case CUDA_R_16BF: return from_bits((uint32_t)((const uint16_t*)data)[i] << 16);
        case CUDA_R_8F_E4M3: {
            uint8_t bits = ((const uint8_t*)data)[i];
            int exponent = bits >> 3 & 15;
            float value = exponent ? ldexpf(8 + (bits & 7), exponent - 10) : ldexpf(bits & 7, -9);
            return bits >> 7 ? -value : value;
        }
        default: return ((const float*)data)[i];
    }
}
static void store(void* data, cudaDataType type, int64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    switch (type) {
        case CUDA_R_32I: ((int32_t*)data)[i] = (int32_t)value; break;
        case CUDA_R_16F: ((_Float16*)data)[i] = (_Float16)value; break;
        case CUDA_R_16BF: ((uint16_t*)data)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; break;
        default: ((float*)data)[i] = value;
    }
}

#ifndef WITHOUT_COMPRESSION
/* Compressed: the kept values row by row, then two 2-bit positions for each group of four, a nibble each. */
cusparseStatus_t cusparseLtSpMMACompressedSize2(const cusparseLtHandle_t* handle,
                                                const cusparseLtMatDescriptor_t* descriptor, size_t* size,
                                                size_t* scratch) {
    Matrix* matrix = get(descriptor);
    int64_t entries = matrix->rows * matrix->cols;
    *size = entries / 2 * size_of(matrix->type) + entries / 8;
    *scratch = 256;
    return SUCCESS;
}
cusparseStatus_t cusparseLtSpMMACompress2(const cusparseLtHandle_t* handle, const cusparseLtMatDescriptor_t* descriptor,
                                          int is_a, cusparseOperation_t op, const void* dense, void* compressed,
                                          void* scratch, cudaStream_t stream) {
    Matrix* matrix = get(descriptor);
    int64_t entries = matrix->rows * matrix->cols, size = size_of(matrix->type);
    char* values = compressed;
    uint8_t* positions = (uint8_t*)compressed + entries / 2 * size;
    if (!is_a || op != CUSPARSE_OPERATION_NON_TRANSPOSE || !scratch) return INVALID;
    memset(compressed, 0, entries / 2 * size + entries / 8);
    for (int64_t group = 0; group < entries / 4; ++group) {
        int kept = 0;
        for (int i = 0; i < 4 && kept < 2; ++i)
            if (load(dense, matrix->type, 4 * group + i) != 0) {
                memcpy(values + (2 * group + kept) * size, (const char*)dense + (4 * group + i) * size, size);
                positions[group / 2] |= i << (4 * (group % 2) + 2 * kept++);
            }
    }
    note("compress", 0, 0, 0);
    return SUCCESS;
}
#endif

cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t* handle, const cusparseLtMatmulPlan_t* plan,
                                  const void* alpha, const void* a, const void* b, const void* beta, const void* c,
                                  void* d, void* workspace, cudaStream_t* streams, int32_t count) {
    Product* p = ((Plan*)get(plan))->product;
    Choice choice = ((Plan*)get(plan))->choice;
    int64_t entries = p->a.rows * p->a.cols;
    const uint8_t* positions = (const uint8_t*)a + entries / 2 * size_of(p->a.type);
    if (count != 1 || *(const float*)beta != 0 || c != d) return INVALID;
    if (number("STAND_IN_WORKSPACE", 0)) {
        if (!workspace) return INVALID;
        memset(workspace, 1, number("STAND_IN_WORKSPACE", 0));
    }
    if (choice.id == number("STAND_IN_DIES", -1)) abort();
    if (choice.id == number("STAND_IN_HANGS", -1)) sleep(600);
    if (choice.id != number("STAND_IN_FAST", choice.id)) usleep(number("STAND_IN_SLOW_US", 2000));
    float* row = calloc(p->a.cols, sizeof(float));
    for (int64_t m = 0; m < p->a.rows; ++m) {
        memset(row, 0, p->a.cols * sizeof(float));
        for (int64_t k = 0; k < p->a.cols / 2; ++k) {
            int64_t group = m * p->a.cols / 4 + k / 2;
            int at = positions[group / 2] >> (4 * (group % 2) + 2 * (k % 2)) & 3;
            row[4 * (k / 2) + at] += load(a, p->a.type, m * p->a.cols / 2 + k);
        }
        for (int64_t n = 0; n < p->b.rows; ++n) {
            float sum = 0;
            for (int64_t k = 0; k < p->a.cols; ++k) sum += row[k] * load(b, p->b.type, n * p->b.cols + k);
            sum *= ((const float*)alpha)[p->scaled ? m : 0];
            if (p->bias) sum += load(p->bias, p->d.type, m);
            if (p->relu) sum = sum > 0 ? sum : 0;
            if (p->gelu) sum *= 0.5f * (1 + tanhf(0.7978845608f * (sum + 0.044715f * sum * sum * sum)));
            if (choice.id == number("STAND_IN_WRONG", -1)) sum += 1;
            store(d, p->d.type, n * p->d.rows + m, sum);
        }
    }
    free(row);
    return SUCCESS;
}
