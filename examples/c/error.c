#include "error.h"

#include <stdarg.h>
#include <stdio.h>

et_status et_fail(et_error *error, et_status status, const char *text, ...) {
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(error->text, sizeof error->text, text, arguments);
    va_end(arguments);
    et_printable(error->text);
    error->status = status;
    return status;
}

void et_printable(char *text) {
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte == '\n' || byte == '\t') *text = ' ';
        else if (byte < 0x20 || byte == 0x7f) *text = '?';
    }
}
