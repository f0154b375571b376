// A recorded command buffer: a kp::Sequence of our own operations, replayed at will.
#pragma once

#include <chrono>

#include "device.hpp"
#include "kompute/Sequence.hpp"

namespace vkllm {

struct BoundRange
{
    std::shared_ptr<Buffer> buffer;
    uint64_t offset;
    uint64_t nbytes;
    VkFormat format; // VK_FORMAT_UNDEFINED: storage buffer
};

class Recording
{
  public:
    Recording(std::shared_ptr<Device> device, uint32_t timestamps);
    ~Recording();
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    void dispatch(std::shared_ptr<Pipeline> pipeline, const std::vector<BoundRange>& ranges, std::array<uint32_t, 3> groups, const std::string& push);
    void barrier();
    void copy(std::shared_ptr<Buffer> src, std::shared_ptr<Buffer> dst, uint64_t nbytes, uint64_t src_offset, uint64_t dst_offset);
    uint32_t timestamp();
    void finish();

    void submit();
    /// False: still running after `timeout_ns`; wait again.
    bool wait(uint64_t timeout_ns);
    bool running() const { return m_sequence->isRunning(); }
    std::vector<uint64_t> timestamps() const;

  private:
    VkDescriptorSet allocate_set(const Pipeline& pipeline);

    const std::shared_ptr<Device> m_device;
    std::shared_ptr<kp::Sequence> m_sequence;
    std::vector<VkDescriptorPool> m_pools;
    uint32_t m_sets_left = 0;
    std::map<VkDescriptorType, uint32_t> m_descriptors_left;
    VkQueryPool m_queries = VK_NULL_HANDLE;
    const uint32_t m_query_capacity;
    uint32_t m_query_count = 0;
    VkFence m_fence = VK_NULL_HANDLE; // of the submit in flight
    bool m_finished = false; // no more commands
    bool m_ended = false;    // and the command buffer may be submitted
    std::set<std::shared_ptr<Buffer>> m_buffers; // kept alive as long as the command buffer may run
    std::set<std::shared_ptr<Pipeline>> m_pipelines;
};

} // namespace vkllm
