/* The tap of tap.py in C: called for every tensor of a graph, about 21 times a layer and token.
 *
 * It knows nothing of Python and needs no header of ggml: the functions that it calls are put into
 * its struct by tap.py, which has the same struct and the same numbers. Built by tap_library.py.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FAULT_NONE = 0, FAULT_NO_ROWS = 1, FAULT_SCATTERED = 2 };

struct tap {
    /* ggml.h, ggml-backend.h: ggml_get_name, ggml_nbytes, ggml_is_contiguous, _tensor_get, _set */
    const char *(*get_name)(const void *tensor);
    size_t (*nbytes)(const void *tensor);
    bool (*is_contiguous)(const void *tensor);
    void (*tensor_get)(const void *tensor, void *data, size_t offset, size_t size);
    void (*tensor_set)(void *tensor, const void *data, size_t offset, size_t size);
    const char *out; /* the tensor that is taken, "" for none; the graph stops there */
    const char *in;  /* the tensor that is overwritten with the input, "" for none */
    char *rows;      /* what is taken comes here: room for as many rows as a batch may have */
    const char *input;
    uint64_t row_bytes;
    uint64_t tokens; /* rows of this step */
    uint64_t taken;
    uint64_t given;
    uint64_t calls;
    uint64_t fault;
    uint64_t fault_bytes;
};

/* For tap.py, which compares. */
size_t halka_tap_bytes(void) { return sizeof(struct tap); }

static bool is(const char *wanted, const char *name) {
    return wanted[0] != '\0' && strcmp(wanted, name) == 0;
}

/* ggml-backend.h: ggml_backend_sched_eval_callback. Asked (ask): is it a tensor of ours? Else it is
 * computed; false stops the graph. */
bool halka_tap_see(void *tensor, bool ask, void *user_data) {
    struct tap *tap = user_data;
    const char *name = tap->get_name(tensor);
    bool in = is(tap->in, name);
    if (ask) return in || is(tap->out, name);
    uint64_t size = tap->nbytes(tensor);
    uint64_t count = size / tap->row_bytes;
    uint64_t done = in ? tap->given : tap->taken;
    if (size % tap->row_bytes != 0 || count > tap->tokens || done > tap->tokens - count) {
        tap->fault = FAULT_NO_ROWS;
        tap->fault_bytes = size;
        return false;
    }
    if (!tap->is_contiguous(tensor)) {
        tap->fault = FAULT_SCATTERED;
        return false;
    }
    if (in) {
        tap->tensor_set(tensor, tap->input + done * tap->row_bytes, 0, size);
        tap->given += count;
        tap->calls += tap->out[0] == '\0';
        return true;
    }
    tap->tensor_get(tensor, tap->rows + done * tap->row_bytes, 0, size);
    tap->taken += count;
    tap->calls += 1;
    return false;
}
