// Memory that stays with the calling thread, so that no call has to ask for it.
#pragma once

#include <cstdlib>

namespace pagemill {

struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    // Aligned to a cache line; holds anything.
    char* at_least(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = static_cast<char*>(std::aligned_alloc(64, size));
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};

inline thread_local Scratch scratch;

}  // namespace pagemill
